//! The queue of a real GPU. Not run on one yet.

use std::ptr;

use tch::{Device, Kind, Tensor};

use super::queue::{GpuError, Queue};
use crate::kernels::cuda::{CompileCache, Compiler, Gpu, KernelSet, Launch, Program, Stream};
use crate::shim::{self, AhaGraph};

/// A CUDA stream of its own, on which libtorch's operators of this thread run too. Stays on the thread that made it.
#[derive(Debug)]
pub struct CudaQueue {
    device: usize,
    kernels: KernelSet,
    stream: Stream,
}

/// A captured CUDA graph.
#[derive(Debug)]
pub struct CudaGraph(*mut AhaGraph);

impl CudaQueue {
    /// Makes CUDA device `device` this thread's own, and loads the kernels of `programs`, compiled unless `cache` has
    /// them.
    ///
    /// # Errors
    /// If there is no such device, or a kernel cannot be compiled or loaded.
    pub fn new(device: usize, programs: &[Program], cache: &CompileCache) -> Result<Self, GpuError> {
        let index = i32::try_from(device).unwrap_or(i32::MAX);
        // SAFETY: takes a number, and returns null or a message.
        check("taking a CUDA stream", unsafe { shim::aha_cuda_own_stream(index) })?;
        // The first tensor makes the GPU current for the driver.
        drop(Tensor::f_zeros([1], (Kind::Float, Device::Cuda(device)))?);
        let (gpu, compiler) = (Gpu::current()?, Compiler::open()?);
        let compile = |program: &Program| Ok((*program, cache.get(&compiler, program, gpu)?));
        let compiled: Vec<_> = programs.iter().map(compile).collect::<Result<_, GpuError>>()?;
        Ok(Self { device, kernels: KernelSet::load(&compiled)?, stream: Stream::current(index)? })
    }
}

impl Queue for CudaQueue {
    type Graph = CudaGraph;

    fn device(&self) -> Device {
        Device::Cuda(self.device)
    }

    fn host_memory(&self, len: usize) -> Result<Tensor, GpuError> {
        Ok(Tensor::f_zeros([len as i64], (Kind::Int, Device::Cpu))?.f_pin_memory(self.device())?)
    }

    unsafe fn launch(&mut self, launch: &Launch) -> Result<(), GpuError> {
        // SAFETY: the caller vouches for the same.
        Ok(unsafe { self.kernels.launch(launch, self.stream) }?)
    }

    fn product(&mut self, x: &Tensor, weight: &Tensor, out: &Tensor) -> Result<(), GpuError> {
        let weight = weight.f_tr()?; // [in, out]
        let same = match out.kind() {
            Kind::Float => x.f_mm_dtype_out(out, &weight, Kind::Float),
            _ => x.f_mm_out(out, &weight),
        };
        same.map(drop).map_err(GpuError::from)
    }

    fn capture(&mut self, work: impl Fn(&mut Self) -> Result<(), GpuError>) -> Result<CudaGraph, GpuError> {
        work(self)?;
        self.synchronize()?;
        let mut graph = CudaGraph(ptr::null_mut());
        // SAFETY: the shim writes one pointer.
        check("beginning to capture a CUDA graph", unsafe { shim::aha_graph_begin(&mut graph.0) })?;
        let captured = work(self);
        // SAFETY: the graph exists. It is ended whatever came of the work, so that the stream is free again.
        let ended = check("capturing a CUDA graph", unsafe { shim::aha_graph_end(graph.0) });
        captured.and(ended).map(|()| graph)
    }

    fn replay(&mut self, graph: &CudaGraph) -> Result<(), GpuError> {
        // SAFETY: the graph was captured.
        check("launching a CUDA graph", unsafe { shim::aha_graph_replay(graph.0) })
    }

    fn synchronize(&mut self) -> Result<(), GpuError> {
        synchronize(self.device())
    }

    fn free_unused_memory(&mut self) -> Result<(), GpuError> {
        self.synchronize()?;
        // SAFETY: takes nothing, and returns null or a message.
        check("giving GPU memory back", unsafe { shim::aha_cuda_empty_cache() })
    }
}

/// Waits for what this thread has queued on a device; returns at once on the CPU.
pub(super) fn synchronize(device: Device) -> Result<(), GpuError> {
    let Device::Cuda(index) = device else { return Ok(()) };
    let index = i32::try_from(index).unwrap_or(i32::MAX);
    // SAFETY: takes a number, and returns null or a message.
    check("waiting for the GPU", unsafe { shim::aha_cuda_synchronize(index) })
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: the graph is ours, or null, and nobody uses it any more.
        unsafe { shim::aha_graph_free(self.0) };
    }
}

fn check(operation: &'static str, message: *mut std::ffi::c_char) -> Result<(), GpuError> {
    // SAFETY: every caller passes what a shim function returned just now.
    unsafe { shim::check(message) }.map_err(|reason| GpuError::Cuda { operation, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_the_error_says_so() {
        if tch::Cuda::is_available() {
            return;
        }
        let cache = CompileCache::new(std::env::temp_dir());
        let error = CudaQueue::new(0, &[], &cache).unwrap_err().to_string();
        assert!(error.starts_with("taking a CUDA stream: "), "{error}");
    }
}
