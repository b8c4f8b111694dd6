//! A GPU for tests of the step: kernels run as C++, on tensors of the CPU.

use std::rc::Rc;

use aha_cuda_emulation::{Arg, Order};
use aha_nn::fused_kernels::{self, Launcher};
use aha_nn::gpu::GpuError;
use aha_nn::kernels::cuda::{CompileCache, Launch};
use tch::{Device, Kind, Tensor};

/// Performs everything at once.
#[derive(Debug)]
struct EmulatedGpu;

impl Launcher for EmulatedGpu {
    #[expect(unsafe_code, reason = "the trait asks for it")]
    unsafe fn launch(&self, launch: &Launch) -> Result<(), GpuError> {
        let program = launch.program.to_string();
        let args: Vec<Arg> = launch.args().map(|(value, size)| Arg { value, size }).collect();
        let Launch { kernel, grid, num_threads, .. } = *launch;
        let emulated = aha_cuda_emulation::Launch { program: &program, kernel, grid, num_threads, args: &args };
        // SAFETY: the caller vouches for the addresses, which are those of CPU tensors here.
        let ran = unsafe { aha_cuda_emulation::launch(&emulated, Order::Ascending) };
        ran.map_err(|reason| GpuError::Cuda { operation: "emulating a launch", reason })
    }

    fn product(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x.to_kind(Kind::Float).mm(&weight.to_kind(Kind::Float).tr())
    }
}

/// Runs `work` with the GPU's kernels for tensors of `kind`: on `device` if that is a GPU, else by emulation.
pub(super) fn with_gpu<T>(device: Device, kind: Kind, work: impl FnOnce() -> T) -> T {
    if device == Device::Cpu {
        return fused_kernels::with_launcher(device, kind, Rc::new(EmulatedGpu), work);
    }
    let cache = CompileCache::new(std::env::temp_dir().join("aha-test-kernels"));
    assert!(fused_kernels::load(device, kind, 64, &cache).unwrap(), "there are kernels for {kind:?}");
    work()
}
