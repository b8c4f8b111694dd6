//! Lets the targets that need libtorch find it when they run.

fn main() {
    if let Ok(link_arg) = std::env::var("DEP_AHA_SHIM_LINK_ARG") {
        println!("cargo::rustc-link-arg={link_arg}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
