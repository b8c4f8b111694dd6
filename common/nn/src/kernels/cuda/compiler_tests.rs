//! Tests of [`super`]: NVRTC needs no GPU.

use std::sync::Mutex;
use std::thread;

use super::super::{AttentionShape, CompileCache, Element, LogitKind};
use super::*;

const HOPPER: Gpu = Gpu { major: 9, minor: 0 };
const AMPERE: Gpu = Gpu { major: 8, minor: 0 };

/// Head dim and query heads per key head of the models that are served: SmolLM2 135M and 360M (64, 3) and 1.7B (64, 1);
/// Qwen2.5 0.5B (64, 7), 1.5B (128, 6), 3B (128, 8), 7B (128, 7); Qwen3 0.6B and 1.7B (128, 2), 4B and 8B (128, 4);
/// Llama 3.2 1B (64, 4) and 3B (128, 3), 3.1 8B (128, 4).
const HEADS: [(usize, usize); 10] =
    [(64, 3), (64, 1), (64, 7), (128, 6), (128, 8), (128, 7), (128, 2), (128, 4), (64, 4), (128, 3)];

fn compiler() -> Option<Compiler> {
    match Compiler::open() {
        Ok(compiler) => Some(compiler),
        Err(CompileError::NoCompiler { reason }) => {
            eprintln!("skipped: there is no NVRTC on this machine ({reason})");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn every_program_of_every_model_compiles() {
    let Some(compiler) = compiler() else { return };
    let attention = |(head_dim, group), block_size| Program::Attention(AttentionShape { head_dim, group, block_size });
    let rope = [32, 64, 128].map(|head_dim| Program::Rope { head_dim });
    let others = [
        Program::Sampling(LogitKind::Fp32),
        Program::Sampling(LogitKind::Bf16),
        Program::Elementwise,
        Program::Step,
        Program::Training(Element::Bf16),
        Program::Training(Element::Fp32),
        attention((64, 7), 64),
        attention((128, 6), 32),
        attention((32, 2), 16),
    ];
    let everywhere = others.into_iter().chain(rope).flat_map(|program| [HOPPER, AMPERE].map(|gpu| (program, gpu)));
    // The number of query heads changes constants only: one of a head dim will do for the older GPU.
    let jobs: Vec<(Program, Gpu)> = everywhere.chain(HEADS.map(|heads| (attention(heads, 16), HOPPER))).collect();
    let (queue, num_compiled) = (Mutex::new(jobs.iter()), Mutex::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((program, gpu)) = { queue.lock().unwrap().next() } {
                    let code = compiler.compile(program, *gpu).unwrap();
                    assert!(code.starts_with(b"\x7fELF"), "a CUBIN is an ELF file");
                    let names = program.kernels().filter(|name| contains(&code, name.as_bytes())).count();
                    assert_eq!(names, program.kernels().count(), "{program} lacks a kernel");
                    *num_compiled.lock().unwrap() += 1;
                }
            });
        }
    });
    assert_eq!(*num_compiled.lock().unwrap(), jobs.len());
}

fn contains(code: &[u8], name: &[u8]) -> bool {
    code.windows(name.len()).any(|window| window == name)
}

#[test]
fn a_mistake_is_reported_with_its_line() {
    let Some(compiler) = compiler() else { return };
    let options = compiler.options(&Program::Step, HOPPER);
    let source = "#include \"prelude.cuh\"\n\nKERNEL(wrong, 32)() { undeclared(); }\n";
    let (reason, log) = compiler.compile_source("wrong", source, &options).unwrap_err();
    assert!(reason.contains("COMPILATION"), "{reason}");
    assert!(log.contains("wrong.cu(3)") && log.contains("undeclared"), "{log}");
    let unknown = compiler.compile(&Program::Step, Gpu { major: 1, minor: 0 }).unwrap_err().to_string();
    assert!(unknown.contains("step for sm_10"), "{unknown}");
}

#[test]
fn programs_are_compiled_once_for_a_gpu() {
    let Some(compiler) = compiler() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cache = CompileCache::new(folder.path().join("kernels"));
    let rope = Program::Rope { head_dim: 64 };
    let first = cache.get(&compiler, &rope, HOPPER).unwrap();
    assert_eq!(cache.get(&compiler, &rope, HOPPER).unwrap(), first);
    assert_ne!(cache.get(&compiler, &rope, AMPERE).unwrap(), first);
    assert_ne!(cache.get(&compiler, &Program::Rope { head_dim: 128 }, HOPPER).unwrap(), first);
    assert_eq!(std::fs::read_dir(folder.path().join("kernels")).unwrap().count(), 3);
}

#[test]
fn architectures_are_named_as_nvrtc_names_them() {
    let name = |major, minor| Gpu { major, minor }.architecture();
    assert_eq!([name(8, 0), name(8, 9), name(9, 0), name(10, 0)], ["sm_80", "sm_89", "sm_90a", "sm_100a"]);
}

#[test]
fn the_wheels_are_beside_the_libtorch_that_is_loaded() {
    let maps = "7f0000000000-7f0000001000 r--p 00000000 fd:00 12 /usr/lib/libc.so.6\n7f0000002000-7f0000003000 rw-p 00000000 00:00 0 \n\
                7f1000000000-7f1000001000 r-xp 00002000 fd:00 99    /opt/my venv/site-packages/torch/lib/libtorch_cpu.so\n";
    assert_eq!(loaded_torch_site(maps), Some(PathBuf::from("/opt/my venv/site-packages")));
    assert_eq!(loaded_torch_site("7f0-7f1 rw-p 0 0:0 0 [heap]\n"), None);
    let own = loaded_torch_site(&std::fs::read_to_string("/proc/self/maps").unwrap()).unwrap();
    assert!(own.is_dir(), "{own:?}");
}
