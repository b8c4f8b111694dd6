//! Byte strings between ranks: small control objects, serialised by the caller.

use super::error::CommError;
use super::group::ProcessGroup;
use super::note::Note;
use std::panic::Location;
use tch::{Device, Kind, Tensor};

impl ProcessGroup {
    /// The byte strings of all ranks, in the order of ranks. They may differ in length.
    ///
    /// # Errors
    /// As for the collectives: this is two of them, lengths first, then all padded to the longest. With the lengths go the
    /// lines of code that ask: [`CommError::Mismatch`] where they differ.
    #[track_caller]
    pub fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let note = Note::new("all_gather_bytes", Location::caller()).with_length(bytes.len());
        let (input, mut output) = note.tensors(self.size(), self.device());
        self.all_gather(&input, &mut output)?;
        let notes = self.to_bytes("all_gather_bytes", &output)?;
        note.compare(&notes).map_err(|mismatch| self.mismatch(&mismatch))?;
        let lengths = Note::lengths(&notes);
        let longest = lengths.iter().copied().max().unwrap_or(0);

        let mut padded = bytes.to_vec();
        padded.resize(longest, 0);
        let input = Tensor::from_slice(&padded).to_device(self.device());
        let mut output = Tensor::zeros([(self.size() * longest) as i64], (Kind::Uint8, self.device()));
        self.all_gather(&input, &mut output)?;
        let flat = self.to_bytes("all_gather_bytes", &output)?;
        Ok(lengths.iter().enumerate().map(|(rank, len)| flat[rank * longest..][..*len].to_vec()).collect())
    }

    /// The byte string of rank `root`. What the others pass is ignored.
    ///
    /// # Errors
    /// As for the collectives: this is two of them, the length first.
    #[track_caller]
    pub fn broadcast_bytes(&self, bytes: &[u8], root: usize) -> Result<Vec<u8>, CommError> {
        let mut length = Tensor::from_slice(&[bytes.len() as i64]).to_device(self.device());
        self.broadcast(&mut length, root)?;
        let length = self.lengths("broadcast_bytes", &length)?[0];
        let mut payload = if self.rank() == root {
            Tensor::from_slice(bytes).to_device(self.device())
        } else {
            Tensor::zeros([length as i64], (Kind::Uint8, self.device()))
        };
        self.broadcast(&mut payload, root)?;
        self.to_bytes("broadcast_bytes", &payload)
    }

    fn lengths(&self, operation: &'static str, lengths: &Tensor) -> Result<Vec<usize>, CommError> {
        let lengths = Vec::<i64>::try_from(lengths.to_device(Device::Cpu))
            .map_err(|error| self.invalid(operation, error.to_string()))?;
        let convert =
            |length: i64| usize::try_from(length).map_err(|_| self.invalid(operation, format!("length {length}")));
        lengths.into_iter().map(convert).collect()
    }

    pub(super) fn to_bytes(&self, operation: &'static str, tensor: &Tensor) -> Result<Vec<u8>, CommError> {
        Vec::<u8>::try_from(tensor.to_device(Device::Cpu)).map_err(|error| self.invalid(operation, error.to_string()))
    }
}
