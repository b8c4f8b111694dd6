//! Compiles the C++ shim in `csrc/` against libtorch and tells the crates above where libtorch lies.
//!
//! torch-sys has found libtorch by then (`LIBTORCH`, `LIBTORCH_USE_PYTORCH` or a system folder) and passes its library
//! folder on as `DEP_TCH_LIBTORCH_LIB`.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

const SOURCES: [&str; 14] = [
    "guard",
    "build_info",
    "store",
    "group",
    "gloo",
    "nccl",
    "autograd",
    "function",
    "attention",
    "storage",
    "optim",
    "stream",
    "cuda",
    "cpu_memory",
];

fn main() -> Result<(), Box<dyn Error>> {
    let lib_dir = PathBuf::from(
        env::var_os("DEP_TCH_LIBTORCH_LIB")
            .ok_or("torch-sys did not say where libtorch is; run `cargo xtask setup`")?,
    );
    let torch_dir = lib_dir.parent().ok_or("the libtorch library folder has no parent")?;
    let include_dir = env::var_os("LIBTORCH_INCLUDE").map_or_else(|| torch_dir.to_owned(), PathBuf::from);
    compile(&include_dir.join("include"), cuda_include_dirs(&lib_dir, torch_dir));
    link(&lib_dir);
    println!("cargo::rerun-if-changed=csrc");
    println!("cargo::rerun-if-env-changed=LIBTORCH_INCLUDE");
    println!("cargo::rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    Ok(())
}

fn compile(include_dir: &Path, cuda_include_dirs: Option<[PathBuf; 2]>) {
    let cxx11_abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        // The shim only calls into libtorch: more optimisation costs build time and gains nothing.
        .opt_level(1)
        .debug(false)
        // Without it, libtorch's headers make `at::parallel_for` a loop on one thread.
        .flag("-fopenmp")
        .define("_GLIBCXX_USE_CXX11_ABI", cxx11_abi.as_str())
        .include("csrc")
        .include("csrc/include")
        .flag("-isystem")
        .flag(include_dir)
        .flag("-isystem")
        .flag(include_dir.join("torch/csrc/api/include"));
    if let Some(dirs) = cuda_include_dirs {
        build.define("USE_C10D_NCCL", None).define("AHA_CUDA", None).include("csrc/include/cuda");
        for dir in dirs {
            build.flag("-isystem").flag(dir);
        }
    }
    build.files(SOURCES.map(|name| format!("csrc/{name}.cpp"))).compile("aha_shim");
}

/// The NCCL and CUDA headers of the wheels beside torch's, when libtorch is a CUDA build and they are there.
fn cuda_include_dirs(lib_dir: &Path, torch_dir: &Path) -> Option<[PathBuf; 2]> {
    let nvidia = torch_dir.parent()?.join("nvidia");
    let dirs = [nvidia.join("nccl/include"), nvidia.join("cu13/include")];
    let complete =
        is_cuda_build(lib_dir) && dirs[0].join("nccl.h").exists() && dirs[1].join("cuda_runtime_api.h").exists();
    complete.then_some(dirs)
}

/// Links this crate's own tests, and publishes the linker argument with which the crates above link theirs
/// (`DEP_AHA_SHIM_LINK_ARG`): cargo passes on libraries, but neither a run path nor `--no-as-needed`.
fn link(lib_dir: &Path) {
    let dir = lib_dir.display();
    let mut link_arg = format!("-Wl,-rpath,{dir}");
    println!("cargo::rustc-link-search=native={dir}");
    for name in ["torch_cpu", "c10"] {
        println!("cargo::rustc-link-lib=dylib={name}");
    }
    if is_cuda_build(lib_dir) {
        // Nothing may refer to them by name, but loading them is what registers the CUDA kernels.
        link_arg += &format!(",-L{dir},--push-state,--no-as-needed,-ltorch_cuda,-lc10_cuda,--pop-state");
        println!("cargo::rustc-link-lib=dylib=torch_cuda");
    }
    link_arg += &format!(",-L{dir},{}", openmp(lib_dir));
    println!("cargo::rustc-link-arg={link_arg}");
    println!("cargo::metadata=link_arg={link_arg}");
}

/// The OpenMP runtime that libtorch brings, whatever it is called, so that both share its threads; else the compiler's.
fn openmp(lib_dir: &Path) -> String {
    let names = fs::read_dir(lib_dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut brought: Vec<String> =
        names.filter_map(|name| name.into_string().ok()).filter(|name| name.starts_with("libgomp")).collect();
    brought.sort();
    brought.first().map_or_else(|| "-lgomp".to_owned(), |name| format!("-l:{name}"))
}

fn is_cuda_build(lib_dir: &Path) -> bool {
    lib_dir.join("libtorch_cuda.so").exists()
}
