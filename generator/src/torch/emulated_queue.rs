//! A GPU's queue without a GPU: kernels run as C++ on the CPU, in tensors of the CPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aha_cuda_emulation::{Arg, Order as ThreadOrder};
use aha_nn::gpu::{GpuError, Queue};
use aha_nn::kernels::cuda::Launch;
use tch::{Device, Kind, Tensor};

/// Performs everything at once. A graph is the list of what it captured, with the addresses of that time.
#[derive(Debug, Default)]
pub(crate) struct EmulatedQueue {
    capturing: Option<Vec<Work>>,
    pub(crate) num_captures: Arc<AtomicUsize>,
}

#[derive(Debug)]
pub(crate) enum Work {
    Launch(Launch),
    Product { x: Tensor, weight: Tensor, out: Tensor },
}

impl EmulatedQueue {
    fn perform(work: &Work) -> Result<(), GpuError> {
        match work {
            Work::Launch(launch) => emulate(launch),
            Work::Product { x, weight, out } => {
                product(x, weight, out);
                Ok(())
            }
        }
    }

    fn take(&mut self, work: Work) -> Result<(), GpuError> {
        match &mut self.capturing {
            Some(captured) => captured.push(work),
            None => Self::perform(&work)?,
        }
        Ok(())
    }
}

impl Queue for EmulatedQueue {
    type Graph = Vec<Work>;

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn host_memory(&self, len: usize) -> Result<Tensor, GpuError> {
        Ok(Tensor::zeros([len as i64], (Kind::Int, Device::Cpu)))
    }

    #[expect(unsafe_code, reason = "the trait asks for it")]
    unsafe fn launch(&mut self, launch: &Launch) -> Result<(), GpuError> {
        self.take(Work::Launch(launch.clone()))
    }

    fn product(&mut self, x: &Tensor, weight: &Tensor, out: &Tensor) -> Result<(), GpuError> {
        let [x, weight, out] = [x, weight, out].map(Tensor::shallow_clone);
        self.take(Work::Product { x, weight, out })
    }

    fn capture(&mut self, work: impl Fn(&mut Self) -> Result<(), GpuError>) -> Result<Vec<Work>, GpuError> {
        work(self)?;
        self.capturing = Some(Vec::new());
        let outcome = work(self);
        let captured = self.capturing.take().unwrap();
        self.num_captures.fetch_add(1, Ordering::Relaxed);
        outcome.map(|()| captured)
    }

    fn replay(&mut self, graph: &Vec<Work>) -> Result<(), GpuError> {
        graph.iter().try_for_each(Self::perform)
    }

    fn synchronize(&mut self) -> Result<(), GpuError> {
        Ok(())
    }

    fn free_unused_memory(&mut self) -> Result<(), GpuError> {
        Ok(())
    }
}

fn emulate(launch: &Launch) -> Result<(), GpuError> {
    let program = launch.program.to_string();
    let args: Vec<Arg> = launch.args().map(|(value, size)| Arg { value, size }).collect();
    let Launch { kernel, grid, num_threads, .. } = *launch;
    let emulated = aha_cuda_emulation::Launch { program: &program, kernel, grid, num_threads, args: &args };
    // SAFETY: whoever queued the launch vouched for its addresses, which are those of CPU tensors here.
    #[expect(unsafe_code, reason = "kernels take addresses")]
    let ran = unsafe { aha_cuda_emulation::launch(&emulated, ThreadOrder::Ascending) };
    ran.map_err(|reason| GpuError::Cuda { operation: "emulating a launch", reason })
}

/// Row by row, so that a row does not depend on how many there are: what differs between two batches is not cuBLAS's
/// doing then.
fn product(x: &Tensor, weight: &Tensor, out: &Tensor) {
    let [x, weight] = [x, weight].map(|matrix| matrix.to_kind(Kind::Float));
    for row in 0..x.size()[0] {
        out.get(row).copy_(&weight.mv(&x.get(row)));
    }
}
