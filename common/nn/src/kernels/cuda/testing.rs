//! What the tests of the kernels share: memory, and launches, on the CPU or, with `AHA_TEST_DEVICE=cuda`, on a GPU.
//!
//! On a GPU run with `--test-threads 1`: the first kernel that goes astray spoils the GPU for the whole process.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

use aha_cuda_emulation::{Arg, Order};
use tch::{Device, Tensor};

use super::{CompileCache, Compiler, DevicePtr, Gpu, KernelSet, Launch, Program, Stream};
use crate::tensor_data::bytes;

/// Buffers with the addresses that kernels are given. Elements around a buffer are NaN, or -1.
#[derive(Debug, Default)]
pub(super) struct Memory {
    buffers: Vec<Buffer>,
}

#[derive(Debug)]
struct Buffer {
    /// u8, with `GUARD` before and after, from an address that is a multiple of 16.
    storage: Tensor,
    num_bytes: usize,
}

/// Numbers of any bits.
pub(super) trait Plain: Copy {}

impl Plain for f32 {}
impl Plain for i32 {}
impl Plain for f64 {}
impl Plain for i64 {}
impl Plain for u16 {}
impl Plain for super::Span {}
impl Plain for super::DeviceSamplingParams {}

/// Bytes, in whole lines of the widest load.
const GUARD: usize = 256;
/// What no kernel writes.
const UNTOUCHED: u8 = u8::MAX;

/// Whether the tests run on a GPU.
pub(super) fn on_gpu() -> bool {
    device() != Device::Cpu
}

/// Where the tests run.
pub(crate) fn device() -> Device {
    let name = std::env::var("AHA_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    crate::runtime::device(&name, 0).unwrap_or_else(|error| panic!("AHA_TEST_DEVICE: {error}"))
}

impl Memory {
    pub(super) fn put<T: Plain>(&mut self, values: &[T]) -> DevicePtr {
        let num_bytes = size_of_val(values);
        // SAFETY: `Plain` numbers are all bytes.
        let content = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), num_bytes) };
        let mut padded = vec![UNTOUCHED; 2 * GUARD + num_bytes.next_multiple_of(16)];
        padded[GUARD..][..num_bytes].copy_from_slice(content);
        let buffer = Buffer { storage: Tensor::from_slice(&padded).to_device(device()), num_bytes };
        let address = buffer.address();
        self.buffers.push(buffer);
        address
    }

    /// Rounded.
    pub(super) fn put_bf16(&mut self, values: &[f32]) -> DevicePtr {
        let bits: Vec<u16> = values.iter().map(|value| bf16_bits(*value)).collect();
        self.put(&bits)
    }

    pub(super) fn read<T: Plain>(&self, address: DevicePtr) -> Vec<T> {
        let buffer = self.buffers.iter().find(|buffer| buffer.address() == address);
        let buffer = buffer.expect("the address is that of a buffer");
        let storage = buffer.storage.to_device(Device::Cpu);
        let numbers = bytes(&storage)[GUARD..][..buffer.num_bytes].chunks_exact(size_of::<T>());
        // SAFETY: each chunk is one number of any bits.
        numbers.map(|number| unsafe { number.as_ptr().cast::<T>().read_unaligned() }).collect()
    }

    pub(super) fn read_bf16(&self, address: DevicePtr) -> Vec<f32> {
        self.read::<u16>(address).into_iter().map(bf16_value).collect()
    }

    /// Runs launches one after the other, twice from the same memory: the results must agree on every bit. On the CPU
    /// threads take their turns in another order the second time, so that what depends on it is seen; on a GPU only
    /// chance makes it so.
    #[track_caller]
    pub(super) fn run(&mut self, launches: &[Launch]) {
        self.try_run(launches).unwrap();
    }

    pub(super) fn try_run(&mut self, launches: &[Launch]) -> Result<(), String> {
        let before = self.snapshot();
        self.run_in(Order::Descending, launches)?;
        let first = self.snapshot();
        for (buffer, before) in self.buffers.iter_mut().zip(before) {
            buffer.storage.copy_(&before);
        }
        self.run_in(Order::Ascending, launches)?;
        let same = self.buffers.iter().zip(&first).all(|(buffer, other)| buffer.storage.equal(other));
        if same { Ok(()) } else { Err("two runs differ: threads race".to_owned()) }
    }

    fn snapshot(&self) -> Vec<Tensor> {
        self.buffers.iter().map(|buffer| buffer.storage.copy()).collect()
    }

    fn run_in(&self, order: Order, launches: &[Launch]) -> Result<(), String> {
        for one in launches {
            // SAFETY: the addresses in the arguments are those of buffers of this memory, which outlives the work, as
            // libtorch's streams free memory in the order of their work.
            let launched = unsafe {
                match device() {
                    Device::Cuda(index) => launch_on_gpu(one, index),
                    _ => launch_on_cpu(one, order),
                }
            };
            launched?;
        }
        let intact = self.buffers.iter().all(Buffer::is_intact);
        if intact { Ok(()) } else { Err("a kernel wrote past the end of a buffer".to_owned()) }
    }
}

/// # Safety
/// As for [`aha_cuda_emulation::launch`].
pub(crate) unsafe fn launch_on_cpu(launch: &Launch, order: Order) -> Result<(), String> {
    let args: Vec<Arg> = launch.args.iter().map(|(value, size)| Arg { value, size }).collect();
    let program = launch.program.to_string();
    let Launch { kernel, grid, num_threads, .. } = *launch;
    let emulated = aha_cuda_emulation::Launch { program: &program, kernel, grid, num_threads, args: &args };
    // SAFETY: the caller's.
    unsafe { aha_cuda_emulation::launch(&emulated, order) }
}

/// Compiles the launch's program, unless a test of this process or an earlier one did, and queues it.
///
/// # Safety
/// As for [`KernelSet::launch`].
unsafe fn launch_on_gpu(launch: &Launch, index: usize) -> Result<(), String> {
    thread_local! {
        static LOADED: RefCell<HashMap<Program, KernelSet>> = RefCell::default();
    }
    LOADED.with_borrow_mut(|loaded| {
        let set = match loaded.entry(launch.program) {
            Entry::Occupied(set) => set.into_mut(),
            Entry::Vacant(place) => place.insert(load(launch.program)?),
        };
        let stream = Stream::current(index as i32).map_err(|error| error.to_string())?;
        // SAFETY: the caller's.
        unsafe { set.launch(launch, stream) }.map_err(|error| error.to_string())
    })
}

/// Onto the GPU that is current on this thread.
fn load(program: Program) -> Result<KernelSet, String> {
    let cache = CompileCache::new(std::env::temp_dir().join("aha-test-kernels"));
    let gpu = Gpu::current().map_err(|error| error.to_string())?;
    let compiler = Compiler::open().map_err(|error| error.to_string())?;
    let code = cache.get(&compiler, &program, gpu).map_err(|error| error.to_string())?;
    KernelSet::load(&[(program, code)]).map_err(|error| error.to_string())
}

impl Buffer {
    fn address(&self) -> DevicePtr {
        DevicePtr(self.storage.data_ptr().expose_provenance() as u64 + GUARD as u64)
    }

    fn is_intact(&self) -> bool {
        let storage = self.storage.to_device(Device::Cpu);
        let (before, rest) = bytes(&storage).split_at(GUARD);
        before.iter().chain(&rest[self.num_bytes..]).all(|byte| *byte == UNTOUCHED)
    }
}

/// To the nearest, ties to even.
pub(super) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() { 0x7fff } else { ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

pub(super) fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// What remains of numbers when they are stored.
pub(super) fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| bf16_value(bf16_bits(*value))).collect()
}

/// Equal to what the exact result is stored as, or to a neighbour: half a unit of bf16 for the storing, and
/// `tolerance` for the arithmetic before it, relative to the larger of the value and `scale`.
#[track_caller]
pub(super) fn assert_bf16_close(actual: &[f32], expect: &[f64], scale: f64, tolerance: f64) {
    assert_eq!(actual.len(), expect.len());
    for (i, (a, e)) in actual.iter().zip(expect).enumerate() {
        let allowed = e.abs() / 256.0 * 1.01 + tolerance * e.abs().max(scale);
        assert!((f64::from(*a) - e).abs() <= allowed, "element {i} is {a}, not {e}");
    }
}

/// Numbers below `bound`, always the same for a seed.
pub(super) struct Draws(pub(super) u64);

impl Draws {
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (crate::kernels::cpu::testing::uniform(&mut self.0) * bound as f64) as usize
    }

    pub(super) fn shuffled(&mut self, len: usize) -> Vec<i32> {
        let mut items: Vec<i32> = (0..len as i32).collect();
        for last in (1..len).rev() {
            items.swap(last, self.below(last + 1));
        }
        items
    }
}
