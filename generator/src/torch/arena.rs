//! Memory for the numbers that a pass computes, left by each pass for the next one.

use std::cell::{Ref, RefCell, RefMut};
use std::ops::Range;
use std::rc::Rc;

use aha_nn::kernels::cpu;

/// Buffers that nobody uses at the moment. As many are ever made as a pass needs at once.
#[derive(Debug, Default)]
pub(super) struct Arena(RefCell<Vec<Vec<f32>>>);

/// A buffer on loan.
#[derive(Debug)]
struct Buffer<'a> {
    data: Vec<f32>,
    arena: &'a Arena,
}

/// Rows of a buffer, or some columns of them: projections that were computed as one share a buffer.
#[derive(Debug)]
pub(super) struct Rows<'a> {
    buffer: Rc<RefCell<Buffer<'a>>>,
    num_rows: usize,
    /// Width of the buffer's rows.
    stride: usize,
    columns: Range<usize>,
}

impl Arena {
    /// Rows of unspecified content.
    pub(super) fn rows(&self, num_rows: usize, width: usize) -> Rows<'_> {
        let buffer = Buffer { data: self.take(num_rows * width), arena: self };
        Rows { buffer: Rc::new(RefCell::new(buffer)), num_rows, stride: width, columns: 0..width }
    }

    /// The smallest free buffer of at least `len`, or else the largest, made larger.
    fn take(&self, len: usize) -> Vec<f32> {
        let mut free = self.0.borrow_mut();
        let fitting = free.iter().enumerate().filter(|(_, data)| data.len() >= len).min_by_key(|(_, data)| data.len());
        let index = fitting.or_else(|| free.iter().enumerate().max_by_key(|(_, data)| data.len())).map(|(i, _)| i);
        let mut data = index.map(|index| free.swap_remove(index)).unwrap_or_default();
        if data.len() < len {
            data.resize(len, 0.0);
        }
        data
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        self.arena.0.borrow_mut().push(std::mem::take(&mut self.data));
    }
}

impl Rows<'_> {
    /// The rows cut into pieces of these widths, side by side.
    pub(super) fn split<const P: usize>(self, widths: [usize; P]) -> [Self; P] {
        let mut start = self.columns.start;
        let pieces = widths.map(|width| {
            let columns = start..start + width;
            start = columns.end;
            Self { buffer: Rc::clone(&self.buffer), columns, ..self }
        });
        assert_eq!(start, self.columns.end, "the pieces must make up the rows");
        pieces
    }

    /// Two neighbouring pieces as one.
    pub(super) fn join(self, next: Self) -> Self {
        let are_neighbours = Rc::ptr_eq(&self.buffer, &next.buffer) && self.columns.end == next.columns.start;
        assert!(are_neighbours, "only pieces of the same rows can be joined");
        Self { columns: self.columns.start..next.columns.end, ..self }
    }

    pub(super) fn num_rows(&self) -> usize {
        self.num_rows
    }

    pub(super) fn width(&self) -> usize {
        self.columns.len()
    }

    /// Everything, of rows that are whole.
    pub(super) fn data(&self) -> Ref<'_, [f32]> {
        self.check_whole();
        Ref::map(self.buffer.borrow(), |buffer| &buffer.data[..self.num_rows * self.stride])
    }

    /// As [`Rows::data`].
    pub(super) fn data_mut(&mut self) -> RefMut<'_, [f32]> {
        self.check_whole();
        RefMut::map(self.buffer.borrow_mut(), |buffer| &mut buffer.data[..self.num_rows * self.stride])
    }

    /// Calls `read` with the rows as kernels see them.
    pub(super) fn with<R>(&self, read: impl FnOnce(cpu::Rows) -> R) -> R {
        let buffer = self.buffer.borrow();
        read(cpu::Rows::columns(&buffer.data[..self.num_rows * self.stride], self.stride, self.columns.clone()))
    }

    /// As [`Rows::with`], to write.
    pub(super) fn with_mut<R>(&mut self, write: impl FnOnce(cpu::RowsMut) -> R) -> R {
        let mut buffer = self.buffer.borrow_mut();
        let data = &mut buffer.data[..self.num_rows * self.stride];
        write(cpu::RowsMut::columns(data, self.stride, self.columns.clone()))
    }

    fn check_whole(&self) {
        assert_eq!(self.columns, 0..self.stride, "these are some columns of wider rows");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again() {
        let arena = Arena::default();
        for num_rows in [3, 1, 2, 3] {
            let (a, mut b) = (arena.rows(num_rows, 10), arena.rows(num_rows, 5));
            b.data_mut().fill(1.0);
            assert_eq!((a.num_rows(), a.data().len(), b.data().len()), (num_rows, 10 * num_rows, 5 * num_rows));
        }
        let mut lens: Vec<usize> = arena.0.borrow().iter().map(Vec::len).collect();
        lens.sort_unstable();
        assert_eq!(lens, [15, 30]);
    }

    #[test]
    fn pieces_share_their_rows() {
        let arena = Arena::default();
        let mut rows = arena.rows(2, 4);
        rows.data_mut().copy_from_slice(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        let [a, mut b, c] = rows.split([1, 2, 1]);
        b.with_mut(|b| assert_eq!((b.num_rows(), b.width()), (2, 2)));
        b.with(|b| assert_eq!([b.row(0), b.row(1)], [&[1.0, 2.0], &[5.0, 6.0]]));
        c.with(|c| assert_eq!([c.row(0), c.row(1)], [&[3.0], &[7.0]]));
        let joined = a.join(b);
        joined.with(|joined| assert_eq!(joined.row(1), [4.0, 5.0, 6.0]));
        drop((c, joined));
        assert_eq!(arena.0.borrow().len(), 1);
    }
}
