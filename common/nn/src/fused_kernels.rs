//! Where the trainer's operations are computed: the one place that chooses between our kernels of the CPU, our kernels of a
//! GPU, and libtorch's operations.
//!
//! A thread that has [`load`]ed the kernels onto its GPU uses them; tests have a launcher that emulates one ([`with_launcher`]). **The kernels
//! have not run on a GPU yet.**

use std::cell::RefCell;
use std::fmt::Debug;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use crate::gpu::GpuError;
use crate::kernels::cpu::training::{self, Turn};
use crate::kernels::cuda::{
    CompileCache, Compiler, DevicePtr, Element, Gpu, KernelSet, Launch, LogitGradients, MAX_NORM_WIDTH, Program,
    RmsNorm, RmsNormBackward, Stream, SummariseTargets, SwiGlu, SwiGluBackward, TurnHeads,
};
use crate::shim;
use crate::tensor_data::{f32_slice, f32_slice_mut, i64_slice};

/// Queues work on a GPU, after what libtorch has queued there and before what it queues next.
pub trait Launcher: Debug {
    /// # Errors
    /// If the kernel cannot be launched.
    ///
    /// # Safety
    /// The addresses in the launch are those of memory of this device, of the shapes and types that its builder names.
    unsafe fn launch(&self, launch: &Launch) -> Result<(), GpuError>;

    /// `x * weight^T` in fp32.
    ///
    /// # Shapes
    /// - x: `[M, in]`, weight: `[out, in]`, both bf16; returns `[M, out]`.
    fn product(&self, x: &Tensor, weight: &Tensor) -> Tensor;
}

/// What computes the operations of tensors of one device and type.
#[derive(Debug, Clone)]
pub(crate) enum Kernels {
    /// fp32. Products are oneDNN's.
    Cpu,
    Gpu(GpuKernels),
}

/// The kernels of a GPU.
#[derive(Debug, Clone)]
pub(crate) struct GpuKernels {
    launcher: Rc<dyn Launcher>,
    pub(crate) element: Element,
}

/// What the backward pass of a norm needs, beside the weight.
#[derive(Debug)]
pub(crate) struct NormTape {
    /// What was normalised, `[R, C]`.
    pub(crate) sum: Tensor,
    /// fp32 `[R]`.
    scales: Tensor,
}

/// Angles by which heads turn.
#[derive(Debug)]
pub(crate) struct Angles {
    /// Of every row, `[N, 1, D]`; of every position where there are positions, fp32 `[T, D / 2]`.
    pub(crate) cos: Tensor,
    /// As `cos`.
    pub(crate) sin: Tensor,
    /// i32 `[N]`, below `T`.
    pub(crate) positions: Option<Tensor>,
    /// `D`.
    pub(crate) head_dim: usize,
}

/// Logits of some rows and what they say of their target tokens.
#[derive(Debug)]
pub(crate) struct Targets {
    /// fp32 `[M, V]`.
    pub(crate) logits: Tensor,
    /// i64 `[M]`.
    pub(crate) targets: Tensor,
    pub(crate) temperature: f64,
    /// fp32 `[M]`, as are the next two.
    pub(crate) logprobs: Tensor,
    /// In nats.
    pub(crate) entropies: Tensor,
    /// Of exponentials of the logits over the temperature.
    pub(crate) log_sums: Tensor,
}

thread_local! {
    static GPU: RefCell<Option<(Device, GpuKernels)>> = const { RefCell::new(None) };
}

/// Makes `device` this thread's and loads the kernels for tensors of type `kind` onto it, compiled unless `cache` has them.
/// False where there are none for the device, the type or rows of `hidden_size`: libtorch's operations serve then.
///
/// # Errors
/// If the kernels cannot be compiled or loaded.
pub fn load(device: Device, kind: Kind, hidden_size: usize, cache: &CompileCache) -> Result<bool, GpuError> {
    let (Device::Cuda(index), Some(element)) = (device, element(kind)) else { return Ok(false) };
    if hidden_size > MAX_NORM_WIDTH {
        return Ok(false);
    }
    let index = i32::try_from(index).unwrap_or(i32::MAX);
    // SAFETY: takes a number, and returns null or a message, which is checked once.
    let set = unsafe { shim::check(shim::aha_set_device(index)) };
    set.map_err(|reason| GpuError::Cuda { operation: "choosing a GPU", reason })?;
    // The first tensor makes the GPU current for the driver.
    drop(Tensor::f_zeros([1], (Kind::Float, device))?);
    let (gpu, compiler, program) = (Gpu::current()?, Compiler::open()?, Program::Training(element));
    let code = cache.get(&compiler, &program, gpu)?;
    let launcher = Rc::new(CudaLauncher { device: index, kernels: KernelSet::load(&[(program, code)])? });
    GPU.set(Some((device, GpuKernels { launcher, element })));
    Ok(true)
}

/// While `work` lasts, this thread uses `launcher` for tensors of a device and a type, bf16 or fp32.
///
/// # Panics
/// For another type.
pub fn with_launcher<T>(device: Device, kind: Kind, launcher: Rc<dyn Launcher>, work: impl FnOnce() -> T) -> T {
    /// Puts back what was there, after a panic too.
    struct Before(Option<(Device, GpuKernels)>);
    impl Drop for Before {
        fn drop(&mut self) {
            GPU.set(self.0.take());
        }
    }
    let element = element(kind).expect("the kernels are for bf16 and fp32");
    let before = Before(GPU.replace(Some((device, GpuKernels { launcher, element }))));
    let result = work();
    drop(before);
    result
}

/// Kernels of a GPU, loaded.
#[derive(Debug)]
struct CudaLauncher {
    device: i32,
    kernels: KernelSet,
}

impl Launcher for CudaLauncher {
    unsafe fn launch(&self, launch: &Launch) -> Result<(), GpuError> {
        let stream = Stream::current(self.device)?;
        // SAFETY: the caller's; libtorch gives memory away again in the order of the stream's work.
        Ok(unsafe { self.kernels.launch(launch, stream) }?)
    }

    fn product(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x.mm_dtype(&weight.tr(), Kind::Float)
    }
}

fn element(kind: Kind) -> Option<Element> {
    match kind {
        Kind::BFloat16 => Some(Element::Bf16),
        Kind::Float => Some(Element::Fp32),
        _ => None,
    }
}

impl Kernels {
    /// None where libtorch's operations serve.
    pub(crate) fn of(device: Device, kind: Kind) -> Option<Self> {
        match GpuKernels::of(device) {
            Some(gpu) if element(kind) == Some(gpu.element) => Some(Self::Gpu(gpu)),
            _ => ((device, kind) == (Device::Cpu, Kind::Float)).then_some(Self::Cpu),
        }
    }

    /// The norm of `x + delta`.
    ///
    /// # Shapes
    /// - x and delta: `[.., C]`, weight: `[C]`; returns `[.., C]`.
    pub(crate) fn rms_norm(&self, x: &Tensor, delta: Option<&Tensor>, weight: &Tensor, eps: f64) -> (Tensor, NormTape) {
        let (x, delta) = (x.detach().contiguous(), delta.map(|delta| delta.detach().contiguous()));
        let mut out = x.empty_like();
        let num_rows = (x.numel() / weight.numel()) as i64;
        let mut scales = Tensor::empty([num_rows], (Kind::Float, x.device()));
        let sum = match self {
            Self::Cpu => {
                let sum = delta.map_or_else(|| x.shallow_clone(), |delta| &x + delta);
                let (weight, scales) = (f32_slice(weight), f32_slice_mut(&mut scales));
                training::rms_norm(f32_slice(&sum), weight, eps as f32, scales, f32_slice_mut(&mut out));
                sum
            }
            Self::Gpu(gpu) => {
                let sum = if delta.is_some() { x.empty_like() } else { x.shallow_clone() };
                gpu.launch(
                    &RmsNorm {
                        element: gpu.element,
                        num_rows: num_rows as usize,
                        width: weight.numel(),
                        epsilon: eps as f32,
                        x: gpu.address(&x),
                        addition: delta.as_ref().map(|delta| [gpu.address(delta), gpu.address(&sum)]),
                        weight: gpu.address(weight),
                        out: gpu.address(&out),
                        scales: fp32(&scales),
                    }
                    .launch(),
                );
                sum
            }
        };
        (out, NormTape { sum, scales })
    }

    /// The gradients of `sum` and, if it is wanted, of the weight. `d_sum` is that of the sum where it is used besides.
    pub(crate) fn rms_norm_backward(
        &self,
        NormTape { sum, scales }: &NormTape,
        (weight, weight_is_wanted): (&Tensor, bool),
        d_out: &Tensor,
        d_sum: Option<&Tensor>,
    ) -> (Tensor, Option<Tensor>) {
        let (d_out, d_sum) = (d_out.contiguous(), d_sum.map(Tensor::contiguous));
        let mut d_x = sum.empty_like();
        match self {
            Self::Cpu => {
                let (x, weight, scales) = (f32_slice(sum), f32_slice(weight), f32_slice(scales));
                let d_x_slice = f32_slice_mut(&mut d_x);
                let d_weight = training::rms_norm_backward(x, weight, scales, f32_slice(&d_out), d_x_slice);
                if let Some(d_sum) = d_sum {
                    d_x += d_sum;
                }
                (d_x, weight_is_wanted.then(|| Tensor::from_slice(&d_weight)))
            }
            Self::Gpu(gpu) => {
                let (num_rows, width) = (scales.numel(), weight.numel());
                let parts = weight_is_wanted.then(|| {
                    let num_parts = RmsNormBackward::num_parts(num_rows, width);
                    Tensor::empty([num_parts as i64, width as i64], (Kind::Float, sum.device()))
                });
                gpu.launch(
                    &RmsNormBackward {
                        element: gpu.element,
                        num_rows,
                        width,
                        x: gpu.address(sum),
                        weight: gpu.address(weight),
                        scales: fp32(scales),
                        d_out: gpu.address(&d_out),
                        d_sum: d_sum.as_ref().map(|d_sum| gpu.address(d_sum)),
                        d_x: gpu.address(&d_x),
                        d_weight: parts.as_ref().map(fp32),
                    }
                    .launch(),
                );
                (d_x, parts.map(|parts| parts.sum_dim_intlist(0, false, Kind::Float).to_kind(weight.kind())))
            }
        }
    }

    /// Turns every head of every row by the row's angles, in place.
    ///
    /// # Shapes
    /// - x: `[N, heads * D]` or `[N, heads, D]`, contiguous.
    pub(crate) fn rope_in_place(&self, x: &mut Tensor, angles: &Angles, turn: Turn) {
        let Angles { cos, sin, positions, head_dim } = angles;
        match (self, positions) {
            (Self::Gpu(gpu), Some(positions)) => {
                let num_rows = positions.numel();
                gpu.launch(
                    &TurnHeads {
                        element: gpu.element,
                        num_rows,
                        num_heads: x.numel() / (num_rows * head_dim).max(1),
                        head_dim: *head_dim,
                        x: gpu.address(x),
                        positions: address(positions, Kind::Int),
                        cos: fp32(cos),
                        sin: fp32(sin),
                        is_back: turn == Turn::Back,
                    }
                    .launch(),
                );
            }
            _ => training::rope_in_place(f32_slice_mut(x), f32_slice(cos), f32_slice(sin), *head_dim, turn),
        }
    }

    /// `silu(gate) * up`, all of one shape and contiguous.
    pub(crate) fn silu_mul(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        let mut out = gate.empty_like();
        match self {
            Self::Cpu => training::silu_mul(f32_slice(gate), f32_slice(up), f32_slice_mut(&mut out)),
            Self::Gpu(gpu) => {
                let [gate_address, up, out] = [gate, up, &out].map(|x| gpu.address(x));
                let num_elements = gate.numel();
                gpu.launch(&SwiGlu { element: gpu.element, num_elements, gate: gate_address, up, out }.launch());
            }
        }
        out
    }

    /// The gradients of gate and up, the latter in the memory of `d_out`.
    pub(crate) fn silu_mul_backward(&self, gate: &Tensor, up: &Tensor, mut d_out: Tensor) -> [Tensor; 2] {
        let mut d_gate = gate.empty_like();
        match self {
            Self::Cpu => {
                let (gate, up) = (f32_slice(gate), f32_slice(up));
                training::silu_mul_backward(gate, up, f32_slice_mut(&mut d_out), f32_slice_mut(&mut d_gate));
            }
            Self::Gpu(gpu) => {
                let (element, num_elements) = (gpu.element, gate.numel());
                let [gate, up, d_out, d_gate] = [gate, up, &d_out, &d_gate].map(|x| gpu.address(x));
                gpu.launch(&SwiGluBackward { element, num_elements, gate, up, d_out, d_gate }.launch());
            }
        }
        [d_gate, d_out]
    }

    /// What `logits`, fp32 `[M, V]`, say of `targets`, i64 `[M]`.
    pub(crate) fn summarise_targets(&self, logits: Tensor, targets: &Tensor, temperature: f64) -> Targets {
        let columns = match self {
            Self::Cpu => {
                let found = training::summarise_targets(
                    f32_slice(&logits),
                    i64_slice(&targets.contiguous()),
                    temperature as f32,
                );
                [
                    found.iter().map(|row| row.logprob).collect(),
                    found.iter().map(|row| row.entropy).collect(),
                    found.iter().map(|row| row.log_sum).collect(),
                ]
                .map(|column: Vec<f32>| Tensor::from_slice(&column))
            }
            Self::Gpu(_) => [(); 3].map(|()| Tensor::empty(targets.size(), (Kind::Float, logits.device()))),
        };
        let [logprobs, entropies, log_sums] = columns;
        let targets = Targets { logits, targets: targets.contiguous(), temperature, logprobs, entropies, log_sums };
        if let Self::Gpu(gpu) = self {
            gpu.launch(&gpu.summary(&targets).launch());
        }
        targets
    }

    /// The gradients of the logits, `[M, V]`, from those of log-probs and entropies, fp32 `[M]`: in the memory of the
    /// logits where the operations are in fp32.
    pub(crate) fn logit_gradients(
        &self,
        mut targets: Targets,
        d_logprobs: &Tensor,
        d_entropies: Option<&Tensor>,
    ) -> Tensor {
        let (d_logprobs, d_entropies) = (d_logprobs.contiguous(), d_entropies.map(Tensor::contiguous));
        match self {
            Self::Cpu => {
                let d_entropies = d_entropies.unwrap_or_else(|| d_logprobs.zeros_like());
                let [logprobs, entropies, log_sums] =
                    [&targets.logprobs, &targets.entropies, &targets.log_sums].map(f32_slice);
                let rows = logprobs.iter().zip(entropies).zip(log_sums);
                let summaries: Vec<_> = rows
                    .map(|((&logprob, &entropy), &log_sum)| training::TargetSummary { logprob, entropy, log_sum })
                    .collect();
                training::target_logprobs_backward(
                    f32_slice_mut(&mut targets.logits),
                    i64_slice(&targets.targets),
                    &summaries,
                    (f32_slice(&d_logprobs), f32_slice(&d_entropies)),
                    targets.temperature as f32,
                );
                targets.logits
            }
            Self::Gpu(gpu) => {
                let d_logits = match gpu.element {
                    Element::Bf16 => Tensor::empty(targets.logits.size(), (Kind::BFloat16, targets.logits.device())),
                    Element::Fp32 => targets.logits.shallow_clone(),
                };
                gpu.launch(
                    &LogitGradients {
                        summary: gpu.summary(&targets),
                        d_logprobs: fp32(&d_logprobs),
                        d_entropies: d_entropies.as_ref().map(fp32),
                        d_logits: gpu.address(&d_logits),
                    }
                    .launch(),
                );
                d_logits
            }
        }
    }
}

impl GpuKernels {
    /// None where this thread has none loaded for the device.
    pub(crate) fn of(device: Device) -> Option<Self> {
        GPU.with_borrow(|gpu| gpu.as_ref().filter(|(known, _)| *known == device).map(|(_, gpu)| gpu.clone()))
    }

    /// `x * weight^T` in fp32, of matrices of this type.
    pub(crate) fn product(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        match self.element {
            Element::Bf16 => self.launcher.product(x, weight),
            Element::Fp32 => x.mm(&weight.tr()),
        }
    }

    /// # Panics
    /// If the launch is refused, which ends the process: what follows would compute with what was never written.
    pub(crate) fn launch(&self, launch: &Launch) {
        // SAFETY: launches are made in this crate, of tensors whose type and layout `address` has checked and whose shapes
        // follow from each other; positions are checked where they are packed, and targets by the kernel.
        let launched = unsafe { self.launcher.launch(launch) };
        launched.unwrap_or_else(|error| panic!("training on the GPU: {error}"));
    }

    /// Where a contiguous tensor of this type lies.
    fn address(&self, tensor: &Tensor) -> DevicePtr {
        address(tensor, if self.element == Element::Bf16 { Kind::BFloat16 } else { Kind::Float })
    }

    fn summary(&self, targets: &Targets) -> SummariseTargets {
        let (num_rows, vocab_size) = targets.logits.size2().expect("logits are [M, V]");
        SummariseTargets {
            element: self.element,
            num_rows: num_rows as usize,
            vocab_size: vocab_size as usize,
            temperature: targets.temperature as f32,
            logits: fp32(&targets.logits),
            targets: address(&targets.targets, Kind::Int64),
            logprobs: fp32(&targets.logprobs),
            entropies: fp32(&targets.entropies),
            log_sums: fp32(&targets.log_sums),
        }
    }
}

/// Where a contiguous fp32 tensor lies.
pub(crate) fn fp32(tensor: &Tensor) -> DevicePtr {
    address(tensor, Kind::Float)
}

/// # Panics
/// If the tensor is not contiguous, or of another type.
pub(crate) fn address(tensor: &Tensor, kind: Kind) -> DevicePtr {
    assert!(tensor.is_contiguous() && tensor.kind() == kind, "{tensor:?} is not a contiguous tensor of {kind:?}");
    DevicePtr::of(tensor)
}

impl Angles {
    pub(crate) fn shallow_clone(&self) -> Self {
        Self {
            cos: self.cos.shallow_clone(),
            sin: self.sin.shallow_clone(),
            positions: self.positions.as_ref().map(Tensor::shallow_clone),
            head_dim: self.head_dim,
        }
    }
}

#[cfg(test)]
#[path = "fused_kernels_testing.rs"]
pub(crate) mod testing;
