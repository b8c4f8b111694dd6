//! Where kernels read and write: row views, aligned storage, per-thread scratch.

use std::cell::RefCell;
use std::marker::PhantomData;

use super::number::Lanes;

/// Bytes of a line of the processor's cache.
pub(super) const LINE_BYTES: usize = 64;
/// Floats in it.
pub(super) const LINE: usize = LINE_BYTES / size_of::<f32>();

/// Rows of a row-major matrix, or a range of its columns.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    data: &'a [f32],
    num_rows: usize,
    width: usize,
    stride: usize,
}

/// Rows that a kernel may write.
#[derive(Debug)]
pub struct RowsMut<'a> {
    data: &'a mut [f32],
    num_rows: usize,
    width: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// Contiguous rows of `width`.
    ///
    /// # Shapes
    /// - data: `[rows, width]`.
    pub fn new(data: &'a [f32], width: usize) -> Self {
        Self::columns(data, width, 0..width)
    }

    /// The `columns` of every row.
    ///
    /// # Shapes
    /// - data: `[rows, stride]`; the view is `[rows, columns.len()]`.
    pub fn columns(data: &'a [f32], stride: usize, columns: std::ops::Range<usize>) -> Self {
        let num_rows = check_columns(data.len(), stride, &columns);
        let data = if num_rows == 0 { data } else { &data[columns.start..] };
        Self { data, num_rows, width: columns.len(), stride }
    }

    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    #[inline(always)]
    pub fn row(&self, idx: usize) -> &'a [f32] {
        assert!(idx < self.num_rows);
        &self.data[idx * self.stride..][..self.width]
    }
}

impl<'a> RowsMut<'a> {
    /// As [`Rows::new`].
    pub fn new(data: &'a mut [f32], width: usize) -> Self {
        Self::columns(data, width, 0..width)
    }

    /// As [`Rows::columns`].
    pub fn columns(data: &'a mut [f32], stride: usize, columns: std::ops::Range<usize>) -> Self {
        let num_rows = check_columns(data.len(), stride, &columns);
        let data = if num_rows == 0 { data } else { &mut data[columns.start..] };
        Self { data, num_rows, width: columns.len(), stride }
    }

    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub(super) fn share(self) -> SharedRows<'a> {
        let Self { num_rows, width, stride, .. } = self;
        SharedRows { data: self.data.as_mut_ptr(), num_rows, width, stride, lifetime: PhantomData }
    }
}

fn check_columns(len: usize, stride: usize, columns: &std::ops::Range<usize>) -> usize {
    assert!(
        columns.start < columns.end && columns.end <= stride && len.is_multiple_of(stride),
        "columns {columns:?} of rows of {stride} do not fit {len} elements"
    );
    len / stride
}

/// Rows that several threads write, each its own part.
#[derive(Clone, Copy)]
pub(super) struct SharedRows<'a> {
    data: *mut f32,
    num_rows: usize,
    width: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for an exclusive borrow of plain floats; `part` obliges its callers to keep threads apart.
unsafe impl Send for SharedRows<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    pub(super) fn num_rows(&self) -> usize {
        self.num_rows
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// `len` elements of row `idx`, from column `start`.
    ///
    /// # Safety
    /// No other reference to these elements is alive.
    #[inline(always)]
    pub(super) unsafe fn part(&self, idx: usize, start: usize, len: usize) -> &'a mut [f32] {
        assert!(idx < self.num_rows && start + len <= self.width);
        // SAFETY: the range lies in the borrowed slice; the caller vouches that it is not aliased.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(idx * self.stride + start), len) }
    }

    /// All of `num_rows` contiguous rows from `start` on.
    ///
    /// # Safety
    /// No other reference to these rows is alive.
    #[inline(always)]
    pub(super) unsafe fn rows(&self, start: usize, num_rows: usize) -> &'a mut [f32] {
        assert!(start + num_rows <= self.num_rows && self.stride == self.width);
        // SAFETY: the rows lie in the borrowed slice; the caller vouches that they are not aliased.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start * self.width), num_rows * self.width) }
    }

    /// All of row `idx`.
    ///
    /// # Safety
    /// No other reference to this row is alive.
    #[inline(always)]
    pub(super) unsafe fn row(&self, idx: usize) -> &'a mut [f32] {
        // SAFETY: forwarded to the caller.
        unsafe { self.part(idx, 0, self.width) }
    }
}

/// Zeros that start on a cache line. Large ones cost no memory until they are written.
#[derive(Debug)]
pub(super) struct AlignedBuf<T = f32> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Lanes> AlignedBuf<T> {
    pub(super) fn zeros(len: usize) -> Self {
        let line = LINE_BYTES / size_of::<T>();
        let data = T::zeros(len + line);
        // `align_offset` may decline to answer; alignment is for speed only.
        let start = data.as_ptr().align_offset(LINE_BYTES).min(line);
        Self { data, start, len }
    }

    #[inline(always)]
    pub(super) fn as_slice(&self) -> &[T] {
        &self.data[self.start..][..self.len]
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.data[self.start..][..self.len]
    }
}

/// Calls `operation` with `len` floats of unspecified content that this thread keeps for the next call.
pub(super) fn with_scratch<R>(len: usize, operation: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        static SCRATCH: RefCell<Option<AlignedBuf>> = const { RefCell::new(None) };
    }
    // Taken out while in use: a thread that waits for a parallel loop may run another kernel meanwhile.
    let kept = SCRATCH.with(|scratch| scratch.borrow_mut().take());
    let mut buffer = kept.filter(|b| b.len >= len).unwrap_or_else(|| AlignedBuf::zeros(len));
    let result = operation(&mut buffer.as_mut_slice()[..len]);
    SCRATCH.with(|scratch| {
        let mut slot = scratch.borrow_mut();
        if slot.as_ref().is_none_or(|b| b.len < buffer.len) {
            *slot = Some(buffer);
        }
    });
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_skip_the_rest_of_the_row() {
        let data: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let rows = Rows::columns(&data, 4, 1..3);
        assert_eq!((rows.num_rows(), rows.width()), (3, 2));
        assert_eq!([rows.row(0), rows.row(2)], [&[1.0, 2.0], &[9.0, 10.0]]);
        assert_eq!(Rows::columns(&[], 4, 1..3).num_rows(), 0);
    }

    #[test]
    #[should_panic(expected = "do not fit")]
    fn ragged_rows_are_refused() {
        Rows::new(&[0.0; 7], 2);
    }

    #[test]
    fn scratch_nests() {
        with_scratch(8, |outer| {
            outer.fill(1.0);
            with_scratch(8, |inner| inner.fill(2.0));
            assert_eq!(outer, [1.0; 8]);
        });
    }
}
