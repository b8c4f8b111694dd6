//! Runs of elements of a flat tensor.

use tch::Tensor;

/// Elements `start..start + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub start: i64,
    pub len: i64,
}

impl Range {
    #[must_use]
    pub fn end(self) -> i64 {
        self.start + self.len
    }

    /// The elements of this range in a flat tensor, as a view.
    pub fn of(self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.start, self.len)
    }

    /// What both have; `None` where that is nothing.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (start, end) = (self.start.max(other.start), self.end().min(other.end()));
        (start < end).then(|| Self { start, len: end - start })
    }

    /// The same elements counted from `origin`.
    #[must_use]
    pub fn relative_to(self, origin: i64) -> Self {
        Self { start: self.start - origin, len: self.len }
    }
}
