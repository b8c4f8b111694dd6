//! The process: threads, memory and devices.

use std::fs;
use std::num::NonZeroUsize;

use tch::{Cuda, Device};

use crate::shim::{
    self, aha_cache_cpu_memory, aha_map_large_blocks, aha_peak_memory, aha_release_cpu_memory, aha_used_memory,
};

/// Sets how many threads one operator may use. libtorch keeps them in a pool for the whole process.
pub fn set_num_threads(num_threads: NonZeroUsize) {
    tch::set_num_threads(i32::try_from(num_threads.get()).unwrap_or(i32::MAX));
}

/// How many threads one operator may use.
pub fn num_threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1)
}

/// Lets tensors on the CPU that are made from now on take their memory from a cache of large blocks, which keeps as much
/// as was once in use together. Without it, most of what a step allocates is new to the process and cleared by the system.
pub fn cache_memory() {
    // SAFETY: the cache lives as long as the process; tensors made before are freed as they were made.
    unsafe { aha_cache_cpu_memory() }
}

/// Lets malloc give large blocks back as soon as they are free, for a process that frees few. Otherwise it keeps them in
/// its heap, and clears them by hand where zeros are asked for.
pub fn map_large_blocks() {
    // SAFETY: it changes how malloc works from now on.
    unsafe { aha_map_large_blocks() }
}

/// Gives the memory that the cache of [`cache_memory`] and malloc hold unused back to the system.
pub fn release_memory() {
    // SAFETY: only memory that nobody has is given back.
    unsafe { aha_release_cpu_memory() }
}

/// Memory of this process, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Resident now.
    pub rss: u64,
    /// The largest `rss` so far.
    pub peak_rss: u64,
}

/// Memory of this process, where the system tells (`/proc/self/status`).
pub fn memory() -> Option<Memory> {
    parse_status(&fs::read_to_string("/proc/self/status").ok()?)
}

/// Memory of another process of this machine.
pub fn memory_of(pid: u32) -> Option<Memory> {
    parse_status(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// Memory of this process and of another that runs the same program, in bytes: what is mapped from files, the program and
/// its libraries, both have in common.
pub fn memory_together(pid: u32) -> Option<u64> {
    let own = fs::read_to_string("/proc/self/status").ok()?;
    let other = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let [own, other] =
        [&own, &other].map(|status| Some((status_bytes(status, "VmRSS")?, status_bytes(status, "RssFile")?)));
    let ((own, own_files), (other, other_files)) = (own?, other?);
    Some(own + other - own_files.min(other_files))
}

/// The most memory that computing on `device` ever took, in bytes: tensors on a GPU, this process on a CPU. Where it is
/// known.
pub fn peak_memory(device: Device) -> Option<u64> {
    let Device::Cuda(index) = device else { return Some(memory()?.peak_rss) };
    let mut bytes = 0;
    // SAFETY: the shim writes one number.
    let message = unsafe { aha_peak_memory(i32::try_from(index).ok()?, &raw mut bytes) };
    // SAFETY: the shim returned `message` just now.
    unsafe { shim::check(message) }.ok().map(|()| bytes)
}

/// The memory that is taken now, in bytes: all of a GPU's, by whomever, or this process's on a CPU. Where it is known.
pub fn used_memory(device: Device) -> Option<u64> {
    let Device::Cuda(index) = device else { return Some(memory()?.rss) };
    let mut bytes = 0;
    // SAFETY: the shim writes one number.
    let message = unsafe { aha_used_memory(i32::try_from(index).ok()?, &raw mut bytes) };
    // SAFETY: the shim returned `message` just now.
    unsafe { shim::check(message) }.ok().map(|()| bytes)
}

/// Waits for what is queued on `device`.
pub fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// A device that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("unknown device {0:?}: use cpu, cuda, cuda:N or auto")]
    Unknown(String),
    #[error("device cuda:{index} is not there: libtorch sees {count} CUDA devices")]
    Missing { index: usize, count: usize },
}

/// The device that `name` means: `cpu`, `cuda:N`, `cuda` for `cuda:LOCAL_RANK`, `auto` for that if there is a CUDA device
/// and `cpu` otherwise.
///
/// # Errors
/// [`DeviceError`] when the name means nothing, or a device that this machine lacks.
pub fn device(name: &str, local_rank: usize) -> Result<Device, DeviceError> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" if !Cuda::is_available() => return Ok(Device::Cpu),
        "auto" | "cuda" => local_rank,
        _ => name
            .strip_prefix("cuda:")
            .and_then(|index| index.parse().ok())
            .ok_or_else(|| DeviceError::Unknown(name.to_owned()))?,
    };
    let count = num_cuda_devices();
    if index < count { Ok(Device::Cuda(index)) } else { Err(DeviceError::Missing { index, count }) }
}

/// How many CUDA devices libtorch can use.
pub fn num_cuda_devices() -> usize {
    usize::try_from(Cuda::device_count()).unwrap_or(0)
}

fn parse_status(status: &str) -> Option<Memory> {
    Some(Memory { rss: status_bytes(status, "VmRSS")?, peak_rss: status_bytes(status, "VmHWM")? })
}

fn status_bytes(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_status() {
        let status = "Name:\taha\nVmHWM:\t  470452 kB\nVmRSS:\t  113560 kB\n";
        assert_eq!(parse_status(status), Some(Memory { rss: 113_560 * 1024, peak_rss: 470_452 * 1024 }));
        assert_eq!(parse_status("VmRSS:\t12 kB\n"), None);
        let now = memory().unwrap();
        assert!(now.peak_rss >= now.rss && now.rss > 1 << 20);
    }

    /// Tensors that come and go keep what was written to them, whichever block they get.
    #[test]
    fn cached_memory_belongs_to_one_tensor_at_a_time() {
        cache_memory();
        let mut held: Vec<(i64, tch::Tensor)> = Vec::new();
        for index in 0..400_i64 {
            let draw = aha_core::random::derive_seed(7, &[index as u64]);
            match draw % 8 {
                0 if index % 50 == 0 => release_memory(),
                0..=3 if !held.is_empty() => drop(held.swap_remove(draw as usize / 8 % held.len())),
                _ => {
                    // From below the smallest block that is cached to 5 MB.
                    let len = 200_000 + (draw / 8 % 1_000_000) as i64;
                    held.push((index, tch::Tensor::full([len], index, (tch::Kind::Int, Device::Cpu))));
                }
            }
            for (index, tensor) in &held {
                assert_eq!(tensor.data_ptr() as usize % 64, 0, "aligned for vectors");
                assert!([tensor.min(), tensor.max()].iter().all(|value| value.int64_value(&[]) == *index));
            }
        }
    }

    #[test]
    fn devices_are_named_or_refused() {
        assert_eq!(device("cpu", 3).unwrap(), Device::Cpu);
        assert!(matches!(device("gpu", 0), Err(DeviceError::Unknown(name)) if name == "gpu"));
        assert!(matches!(device("cuda:-1", 0), Err(DeviceError::Unknown(_))));
        let count = num_cuda_devices();
        let error = device(&format!("cuda:{count}"), 0).unwrap_err().to_string();
        assert_eq!(error, format!("device cuda:{count} is not there: libtorch sees {count} CUDA devices"));
        let auto = device("auto", 0).unwrap();
        assert_eq!(auto, if count > 0 { Device::Cuda(0) } else { Device::Cpu });
    }
}
