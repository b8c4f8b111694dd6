//! What a rank is about to do, in a size that is always the same, so that ranks which differ can still tell each other.

use std::fmt;
use std::panic::Location;
use tch::{Device, Kind, Tensor};

/// Bytes of a note: a length, and text.
const SIZE: usize = 128;
const LENGTH_BYTES: usize = 8;

/// One rank's note. Notes match where their texts do; the length is its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Note([u8; SIZE]);

/// Two ranks at different places.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    own: String,
    rank: usize,
    other: String,
}

impl Note {
    /// `what` is done at `caller`. Where that is too long for a note, the front of the file's path goes.
    pub(super) fn new(what: &str, caller: &Location<'_>) -> Self {
        let place = format!("{}:{}", caller.file(), caller.line());
        let room = (SIZE - LENGTH_BYTES).saturating_sub(what.len() + " at ".len());
        let mut start = place.len().saturating_sub(room);
        while !place.is_char_boundary(start) {
            start += 1;
        }
        let text = format!("{what} at {}", &place[start..]);
        let mut note = Self([0; SIZE]);
        let len = text.len().min(SIZE - LENGTH_BYTES);
        note.0[LENGTH_BYTES..][..len].copy_from_slice(&text.as_bytes()[..len]);
        note
    }

    pub(super) fn with_length(mut self, length: usize) -> Self {
        self.0[..LENGTH_BYTES].copy_from_slice(&(length as u64).to_le_bytes());
        self
    }

    /// What an all-gather of notes takes.
    ///
    /// # Shapes
    /// - `[128]` and `[W * 128]`, bytes.
    pub(super) fn tensors(&self, size: usize, device: Device) -> (Tensor, Tensor) {
        let output = Tensor::zeros([(size * SIZE) as i64], (Kind::Uint8, device));
        (Tensor::from_slice(&self.0).to_device(device), output)
    }

    /// Whether the notes of all ranks match this one.
    pub(super) fn compare(&self, notes: &[u8]) -> Result<(), Mismatch> {
        let own = &self.0[LENGTH_BYTES..];
        let other = notes.chunks(SIZE).map(|note| &note[LENGTH_BYTES..]).enumerate().find(|(_, other)| *other != own);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
        other.map_or(Ok(()), |(rank, other)| Err(Mismatch { own: text(own), rank, other: text(other) }))
    }

    /// The lengths of all notes.
    pub(super) fn lengths(notes: &[u8]) -> Vec<usize> {
        let length =
            |note: &[u8]| note[..LENGTH_BYTES].iter().rev().fold(0, |length, byte| length << 8 | usize::from(*byte));
        notes.chunks(SIZE).map(length).collect()
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { own, rank, other } = self;
        write!(f, "it comes to {own}, and rank {rank} to {other}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_of_different_places_differ_and_lengths_do_not_count() {
        let [one, other] = [Location::caller(), Location::caller()];
        let note = Note::new("barrier", one).with_length(3);
        let same = Note::new("barrier", one).with_length(70_000);
        let notes = [note.0, same.0].concat();
        assert_eq!((note.compare(&notes), Note::lengths(&notes)), (Ok(()), vec![3, 70_000]));
        let far = Note::new("barrier", other);
        assert_eq!(far == Note::new("barrier", one), one.line() == other.line());
        let mismatch = note.compare(&[note.0, Note::new("all_reduce", one).0].concat()).unwrap_err();
        assert_eq!(
            (mismatch.rank, mismatch.own.starts_with("barrier at "), mismatch.other.starts_with("all_reduce at ")),
            (1, true, true)
        );
    }

    #[test]
    fn long_notes_keep_what_and_the_end_of_where() {
        let note = Note::new(&"x".repeat(100), Location::caller());
        let text = note.compare(&[0; SIZE]).unwrap_err().own;
        assert!(text.len() <= SIZE - LENGTH_BYTES && text.ends_with(&format!(".rs:{}", line!() - 2)), "{text}");
        let text = Note::new(&"x".repeat(500), Location::caller()).compare(&[0; SIZE]).unwrap_err().own;
        assert_eq!(text, "x".repeat(SIZE - LENGTH_BYTES));
    }
}
