//! Compiles `aha/v1/*.proto` with protox, so that no protoc is needed.

use std::path::Path;

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=aha");
    let files = ["generator", "coordinator", "checkpoint", "rewarder"].map(|name| format!("aha/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["."])?;
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(Path::new(&out).join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
