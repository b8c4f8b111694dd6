//! What the CUDA driver and NCCL say of themselves and of the GPUs. Not run on a GPU yet.

use std::ffi::{CStr, OsStr, c_char, c_int};

use super::Gpu;
use super::library::Library;

const DRIVER: &str = "libcuda.so.1";
const NCCL: &str = "libnccl.so.2";
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const CAPABILITY: [c_int; 2] = [75, 76];

/// The driver of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverInfo {
    /// Newest CUDA that it can run, as `major.minor`.
    pub cuda: String,
    pub gpus: Vec<GpuInfo>,
}

/// A GPU that this process may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    pub name: String,
    pub memory_bytes: u64,
    pub capability: Gpu,
}

/// Asks the driver.
///
/// # Errors
/// If there is none, or it fails: what it could not do.
pub fn driver_info() -> Result<DriverInfo, String> {
    let driver = Library::open(OsStr::new(DRIVER))?;
    // SAFETY: this and those below are the types of cuda.h.
    let init = unsafe { driver.function::<unsafe extern "C" fn(u32) -> c_int>(c"cuInit") }?;
    // SAFETY: no flags; any thread may initialise the driver, any number of times.
    check(unsafe { init(0) }, "cuInit")?;
    let version = number(driver, c"cuDriverGetVersion")?;
    let count = number(driver, c"cuDeviceGetCount")?;
    let gpus = (0..count).map(|ordinal| gpu(driver, ordinal)).collect::<Result<_, _>>()?;
    Ok(DriverInfo { cuda: format!("{}.{}", version / 1000, version % 1000 / 10), gpus })
}

/// The version of NCCL that libtorch uses, where that is a library of its own.
#[must_use]
pub fn nccl_version() -> Option<String> {
    let code = number(Library::open(OsStr::new(NCCL)).ok()?, c"ncclGetVersion").ok()?;
    Some(format!("{}.{}.{}", code / 10_000, code % 10_000 / 100, code % 100))
}

fn gpu(driver: Library, ordinal: c_int) -> Result<GpuInfo, String> {
    type GetDevice = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
    type GetName = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
    type GetMemory = unsafe extern "C" fn(*mut usize, c_int) -> c_int;
    type GetAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
    let (mut device, mut memory, mut name) = (0, 0, [0; 256]);
    // SAFETY: the types of cuda.h.
    let get_device = unsafe { driver.function::<GetDevice>(c"cuDeviceGet") }?;
    // SAFETY: as above.
    let get_name = unsafe { driver.function::<GetName>(c"cuDeviceGetName") }?;
    // SAFETY: as above.
    let get_memory = unsafe { driver.function::<GetMemory>(c"cuDeviceTotalMem_v2") }?;
    // SAFETY: as above.
    let get_attribute = unsafe { driver.function::<GetAttribute>(c"cuDeviceGetAttribute") }?;
    // SAFETY: the driver writes one number.
    check(unsafe { get_device(&raw mut device, ordinal) }, "cuDeviceGet")?;
    // SAFETY: the driver writes 255 characters at most and a zero.
    check(unsafe { get_name(name.as_mut_ptr(), 255, device) }, "cuDeviceGetName")?;
    // SAFETY: the driver writes one number.
    check(unsafe { get_memory(&raw mut memory, device) }, "cuDeviceTotalMem")?;
    let mut capability = [0; 2];
    for (number, attribute) in capability.iter_mut().zip(CAPABILITY) {
        // SAFETY: the driver writes one number.
        check(unsafe { get_attribute(number, attribute, device) }, "cuDeviceGetAttribute")?;
    }
    let [major, minor] = capability.map(|number: c_int| number as u32);
    let name = name.map(|character| character as u8);
    let name = CStr::from_bytes_until_nul(&name).map_or_else(|_| String::new(), |name| name.to_string_lossy().into());
    Ok(GpuInfo { name, memory_bytes: memory as u64, capability: Gpu { major, minor } })
}

/// Of a function that writes one number.
fn number(library: Library, name: &CStr) -> Result<c_int, String> {
    let mut number = 0;
    // SAFETY: `cuDriverGetVersion`, `cuDeviceGetCount` and `ncclGetVersion` have this type.
    let get = unsafe { library.function::<unsafe extern "C" fn(*mut c_int) -> c_int>(name) }?;
    // SAFETY: it writes one number.
    check(unsafe { get(&raw mut number) }, &name.to_string_lossy())?;
    Ok(number)
}

fn check(status: c_int, what: &str) -> Result<(), String> {
    if status == 0 { Ok(()) } else { Err(format!("{what} failed with {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_the_library_is_named() {
        match driver_info() {
            Ok(info) => {
                assert!(info.cuda.contains('.'), "{info:?}");
                assert!(info.gpus.iter().all(|gpu| !gpu.name.is_empty() && gpu.memory_bytes > 1 << 30), "{info:?}");
            }
            Err(reason) => assert!(reason.contains(DRIVER) || reason.contains("cuInit"), "{reason}"),
        }
    }
}
