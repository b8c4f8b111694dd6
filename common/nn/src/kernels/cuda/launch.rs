//! What to run, as plain data.

use tch::Tensor;

use super::Program;

/// An address in the GPU's memory; 0 where a kernel takes none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

/// One launch of a kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    pub program: Program,
    pub kernel: &'static str,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Of a block, all in x.
    pub num_threads: u32,
    pub(super) args: Args,
}

impl DevicePtr {
    /// Where the first element of a tensor lies.
    #[must_use]
    pub fn of(tensor: &Tensor) -> Self {
        Self(tensor.data_ptr().expose_provenance() as u64)
    }

    /// The element of `size` bytes that is `index` after this one.
    #[must_use]
    pub fn at(self, index: usize, size: usize) -> Self {
        Self(self.0 + (index * size) as u64)
    }
}

impl Launch {
    /// Where each argument lies, and its size in bytes.
    pub fn args(&self) -> impl Iterator<Item = (*const std::ffi::c_void, usize)> {
        self.args.iter()
    }
}

/// The arguments of a launch, copied.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Args {
    /// Each argument in as many words as it needs.
    words: Vec<u64>,
    /// Of each argument.
    sizes: Vec<usize>,
}

/// A value that a kernel takes: a number, an address, or a `repr(C)` struct of them without padding.
pub(super) trait Argument: Copy {}

impl Argument for i32 {}
impl Argument for i64 {}
impl Argument for f32 {}
impl Argument for DevicePtr {}

impl Args {
    pub(super) fn with(mut self, value: impl Argument) -> Self {
        let size = size_of_val(&value);
        let start = self.words.len();
        self.words.resize(start + size.div_ceil(8), 0);
        let target = self.words[start..].as_mut_ptr().cast::<u8>();
        // SAFETY: the target has at least `size` bytes, and an `Argument` is plain data without padding.
        unsafe { std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), target, size) };
        self.sizes.push(size);
        self
    }

    /// Where each argument lies, and its size.
    pub(super) fn iter(&self) -> impl Iterator<Item = (*const std::ffi::c_void, usize)> {
        let mut start = 0;
        self.sizes.iter().map(move |&size| {
            let value = self.words[start..].as_ptr().cast();
            start += size.div_ceil(8);
            (value, size)
        })
    }
}

/// `count` in whole warps.
pub(super) fn whole_warps(count: usize) -> u32 {
    count.next_multiple_of(32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_keep_their_order_size_and_bytes() {
        let args = Args::default().with(7_i32).with(DevicePtr(u64::MAX - 1)).with(-0.5_f32);
        let bytes: Vec<Vec<u8>> = args
            .iter()
            // SAFETY: `iter` gives the address and size of memory in `args`.
            .map(|(value, size)| unsafe { std::slice::from_raw_parts(value.cast::<u8>(), size) }.to_vec())
            .collect();
        assert_eq!(bytes, [&7_i32.to_ne_bytes()[..], &(u64::MAX - 1).to_ne_bytes(), &(-0.5_f32).to_ne_bytes()]);
    }
}
