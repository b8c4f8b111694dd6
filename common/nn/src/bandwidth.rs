//! How fast a device copies its own memory.

use std::time::Instant;

use tch::{Cuda, Device, Kind, Tensor};

/// Far more than any cache holds.
const BYTES_ON_GPU: i64 = 1 << 30;
const BYTES_ON_CPU: i64 = 256 << 20;
const COPIES: usize = 10;
const ROUNDS: usize = 3;

/// Bytes per second that are read and written while a large tensor is copied, in the best of a few rounds. On the CPU
/// with as many threads as one operator may use; a processor that reads a line before it writes it moves half as much
/// again, so work that mostly reads can be faster there.
#[must_use]
pub fn copy_bandwidth(device: Device) -> f64 {
    let len = if device.is_cuda() { BYTES_ON_GPU } else { BYTES_ON_CPU };
    let source = Tensor::zeros([len], (Kind::Uint8, device));
    let mut target = source.zeros_like();
    let mut copy = |count: usize| {
        let start = Instant::now();
        (0..count).for_each(|_| target.copy_(&source));
        if let Device::Cuda(index) = device {
            Cuda::synchronize(index as i64);
        }
        start.elapsed().as_secs_f64()
    };
    copy(1);
    let fastest = (0..ROUNDS).map(|_| copy(COPIES)).fold(f64::INFINITY, f64::min);
    (2 * len) as f64 * COPIES as f64 / fastest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_neither_a_disk_nor_a_cache() {
        let bandwidth = copy_bandwidth(Device::Cpu);
        assert!((5e8..2e12).contains(&bandwidth), "{bandwidth:e} bytes per second");
    }
}
