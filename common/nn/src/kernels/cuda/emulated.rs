//! What the tests of the kernels share: memory that stands for the GPU's, and launches on the CPU.

use aha_cuda_emulation::{Arg, Order, launch};

use super::{DevicePtr, Launch};

/// Buffers with the addresses that kernels are given. Elements around a buffer are NaN, or -1.
#[derive(Debug, Default)]
pub(super) struct Memory {
    buffers: Vec<Buffer>,
}

#[derive(Debug)]
struct Buffer {
    /// With `GUARD` before and after.
    lines: Vec<u128>,
    num_bytes: usize,
}

/// Numbers of any bits.
pub(super) trait Plain: Copy {}

impl Plain for f32 {}
impl Plain for i32 {}
impl Plain for u16 {}
impl Plain for super::Span {}
impl Plain for super::DeviceSamplingParams {}

/// Lines of 16 bytes.
const GUARD: usize = 16;

impl Memory {
    pub(super) fn put<T: Plain>(&mut self, values: &[T]) -> DevicePtr {
        let num_bytes = size_of_val(values);
        let mut lines = vec![u128::MAX; 2 * GUARD + num_bytes.div_ceil(16)];
        // SAFETY: the lines between the guards hold as many bytes, and both are plain.
        unsafe {
            let target = lines[GUARD..].as_mut_ptr().cast::<u8>();
            std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), target, num_bytes);
        }
        self.buffers.push(Buffer { lines, num_bytes });
        self.buffers.last_mut().unwrap().address()
    }

    /// Rounded.
    pub(super) fn put_bf16(&mut self, values: &[f32]) -> DevicePtr {
        let bits: Vec<u16> = values.iter().map(|value| bf16_bits(*value)).collect();
        self.put(&bits)
    }

    pub(super) fn read<T: Plain>(&mut self, address: DevicePtr) -> Vec<T> {
        let buffer = self.buffers.iter_mut().find_map(|buffer| (buffer.address() == address).then_some(buffer));
        let buffer = buffer.expect("the address is that of a buffer");
        let len = buffer.num_bytes / size_of::<T>();
        // SAFETY: the buffer holds `len` numbers of any bits, aligned to 16 bytes.
        unsafe { std::slice::from_raw_parts(buffer.lines[GUARD..].as_ptr().cast::<T>(), len) }.to_vec()
    }

    pub(super) fn read_bf16(&mut self, address: DevicePtr) -> Vec<f32> {
        self.read::<u16>(address).into_iter().map(bf16_value).collect()
    }

    /// Runs launches one after the other, in both orders of threads, which must agree on every bit.
    #[track_caller]
    pub(super) fn run(&mut self, launches: &[Launch]) {
        self.try_run(launches).unwrap();
    }

    pub(super) fn try_run(&mut self, launches: &[Launch]) -> Result<(), String> {
        let before: Vec<Vec<u128>> = self.buffers.iter().map(|buffer| buffer.lines.clone()).collect();
        self.run_in(Order::Descending, launches)?;
        let descending: Vec<Vec<u128>> = self.buffers.iter().map(|buffer| buffer.lines.clone()).collect();
        for (buffer, before) in self.buffers.iter_mut().zip(before) {
            buffer.lines.copy_from_slice(&before);
        }
        self.run_in(Order::Ascending, launches)?;
        let same = self.buffers.iter().zip(&descending).all(|(buffer, other)| buffer.lines == *other);
        if same { Ok(()) } else { Err("the result depends on the order of threads: they race".to_owned()) }
    }

    fn run_in(&mut self, order: Order, launches: &[Launch]) -> Result<(), String> {
        for one in launches {
            let args: Vec<Arg> = one.args.iter().map(|(value, size)| Arg { value, size }).collect();
            let program = one.program.to_string();
            let Launch { kernel, grid, num_threads, .. } = *one;
            let emulated = aha_cuda_emulation::Launch { program: &program, kernel, grid, num_threads, args: &args };
            // SAFETY: the addresses in the arguments are those of buffers of this memory, which outlives the call.
            unsafe { launch(&emulated, order) }?;
        }
        let intact = self.buffers.iter().all(Buffer::is_intact);
        if intact { Ok(()) } else { Err("a kernel wrote past the end of a buffer".to_owned()) }
    }
}

impl Buffer {
    fn address(&mut self) -> DevicePtr {
        DevicePtr(self.lines[GUARD..].as_mut_ptr().expose_provenance() as u64)
    }

    fn is_intact(&self) -> bool {
        let untouched = |line: &u128| *line == u128::MAX;
        let end = self.lines.len() - GUARD;
        let past_last = match self.num_bytes % 16 {
            0 => 0,
            used => !(self.lines[end - 1].to_le() >> (8 * used) | !(u128::MAX >> (8 * used))),
        };
        self.lines[..GUARD].iter().all(untouched) && self.lines[end..].iter().all(untouched) && past_last == 0
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
