//! Compiles every kernel for the CPU, in the configurations that the tests run, and writes a table of them.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

const KERNELS: &str = "../nn/kernels/cuda";

/// A source and its macros, in the order in which `aha_nn::kernels::cuda` names them.
const PROGRAMS: [&str; 16] = [
    "attention HEAD_DIM=32 GROUP=2 BLOCK_SIZE=16",
    "attention HEAD_DIM=64 GROUP=1 BLOCK_SIZE=16",
    "attention HEAD_DIM=64 GROUP=3 BLOCK_SIZE=32",
    "attention HEAD_DIM=64 GROUP=7 BLOCK_SIZE=16",
    "attention HEAD_DIM=128 GROUP=6 BLOCK_SIZE=16",
    "attention HEAD_DIM=128 GROUP=16 BLOCK_SIZE=64",
    "elementwise",
    "faults",
    "rope HEAD_DIM=32",
    "rope HEAD_DIM=64",
    "rope HEAD_DIM=128",
    "sampling LOGITS_BF16=0",
    "sampling LOGITS_BF16=1",
    "step",
    "training ELEMENT_BF16=0",
    "training ELEMENT_BF16=1",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=csrc");
    println!("cargo::rerun-if-changed={KERNELS}");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join(KERNELS);
    let (mut declarations, mut table) = (String::new(), String::new());
    let mut build = cc::Build::new();
    // glibc's checked longjmp takes a switch between stacks for a mistake.
    build.cpp(true).std("c++17").opt_level(1).debug(false).flag("-U_FORTIFY_SOURCE").flag("-Wno-unknown-pragmas");
    build.include("csrc").include(&kernels).file("csrc/emulation.cpp");
    for (index, program) in PROGRAMS.iter().enumerate() {
        let mut words = program.split(' ');
        let name = words.next().unwrap_or_default();
        let folder = if name == "faults" { Path::new("csrc") } else { &kernels };
        let path = folder.canonicalize()?.join(format!("{name}.cu"));
        let defines: String = words.map(|define| format!("#define {}\n", define.replace('=', " "))).collect();
        // Configurations define the same names, so each lives in an anonymous namespace.
        let mut unit =
            format!("#include \"emulation.h\"\n{defines}namespace {{\n#include \"{}\"\n}}\n", path.display());
        for kernel in kernel_names(&fs::read_to_string(&path)?) {
            let symbol = format!("aha_emulated_{index}_{kernel}");
            writeln!(
                unit,
                "extern \"C\" const char* {symbol}(const emulated::Args& args, bool run) {{\n  return \
                 emulated::call({kernel}, args, run);\n}}"
            )?;
            writeln!(declarations, "    fn {symbol}(args: &Args, run: bool) -> *const c_char;")?;
            writeln!(table, "    ({program:?}, {kernel:?}, {symbol}),")?;
        }
        let unit_path = out_dir.join(format!("program_{index}.cpp"));
        fs::write(&unit_path, unit)?;
        build.file(unit_path);
    }
    let generated = format!("unsafe extern \"C\" {{\n{declarations}}}\n\nstatic KERNELS: &[Kernel] = &[\n{table}];\n");
    fs::write(out_dir.join("kernels.rs"), generated)?;
    build.compile("aha_cuda_emulation");
    Ok(())
}

/// What `KERNEL(name, threads)` declares.
fn kernel_names(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|line| line.strip_prefix("KERNEL(")?.split(',').next())
}
