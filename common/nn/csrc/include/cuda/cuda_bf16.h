#pragma once
struct __nv_bfloat16 {};
struct __nv_bfloat162 {};
