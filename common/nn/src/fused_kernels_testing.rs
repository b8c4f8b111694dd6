//! A GPU for tests of the fused operations: an emulated one, or with `AHA_TEST_DEVICE=cuda` a real one.

use std::rc::Rc;

use aha_cuda_emulation::Order;
use tch::{Device, Kind, Tensor};

use super::{Launcher, load, with_launcher};
use crate::gpu::GpuError;
pub(crate) use crate::kernels::cuda::testing::device;
use crate::kernels::cuda::testing::launch_on_cpu;
use crate::kernels::cuda::{CompileCache, Launch};

/// Runs kernels as C++, on tensors of the CPU.
#[derive(Debug)]
struct Emulated;

impl Launcher for Emulated {
    unsafe fn launch(&self, launch: &Launch) -> Result<(), GpuError> {
        // SAFETY: the caller's.
        let ran = unsafe { launch_on_cpu(launch, Order::Ascending) };
        ran.map_err(|reason| GpuError::Cuda { operation: "emulating a launch", reason })
    }

    fn product(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x.to_kind(Kind::Float).mm(&weight.to_kind(Kind::Float).tr())
    }
}

pub(crate) fn emulated() -> Rc<dyn Launcher> {
    Rc::new(Emulated)
}

/// Runs `work` with the kernels for tensors of `kind` on [`device`].
pub(crate) fn with_gpu<T>(kind: Kind, work: impl FnOnce() -> T) -> T {
    if device() == Device::Cpu {
        return with_launcher(Device::Cpu, kind, emulated(), work);
    }
    let cache = CompileCache::new(std::env::temp_dir().join("aha-test-kernels"));
    assert!(load(device(), kind, 64, &cache).unwrap(), "there are kernels for {kind:?}");
    work()
}
