#pragma once
struct __nv_fp8_e4m3 {};
struct __nv_fp8_e5m2 {};
