//! Lets the targets that need libtorch find it when they run. The others do not load it.

fn main() {
    if let Ok(link_arg) = std::env::var("DEP_AHA_SHIM_LINK_ARG") {
        for target in ["safetensors", "rpc"] {
            println!("cargo::rustc-link-arg-bin={target}={link_arg}");
        }
    }
    println!("cargo::rerun-if-changed=build.rs");
}
