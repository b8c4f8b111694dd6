#pragma once
struct __half {};
struct __half2 {};
using half = __half;
using half2 = __half2;
