//! Loads compiled kernels and launches them, through the driver's own interface. Not run on a GPU yet.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_uint, c_void};
use std::ptr;

use super::library::Library;
use super::{Gpu, Launch, Program};
use crate::shim;

/// Loaded kernels of one GPU, for the thread on which libtorch uses it. They stay loaded for the life of the process:
/// a captured graph refers to them.
#[derive(Debug)]
pub struct KernelSet {
    driver: Driver,
    functions: HashMap<(Program, &'static str), Handle>,
}

/// A queue of work on a GPU.
#[derive(Debug, Clone, Copy)]
pub struct Stream(Handle);

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("cannot open the CUDA driver: {0}")]
    NoDriver(String),
    #[error("libtorch has no CUDA stream: {0}")]
    NoStream(String),
    /// libtorch makes one with the first tensor on the GPU.
    #[error("no GPU is current on this thread: put a tensor on it first")]
    NoContext,
    #[error("{operation}: {reason}")]
    Driver { operation: String, reason: String },
    #[error("{kernel} of {program} was not loaded")]
    NotLoaded { program: Program, kernel: &'static str },
}

/// What the driver gave out.
type Handle = *mut c_void;

impl Stream {
    /// The one that libtorch's operators on CUDA device `device` are queued on. Kernels launched on it run between
    /// them, and are captured with them into a graph.
    ///
    /// # Errors
    /// If libtorch has no such device.
    pub fn current(device: i32) -> Result<Self, LaunchError> {
        let mut stream = ptr::null_mut();
        // SAFETY: the shim writes one pointer, and its message is checked once.
        let status = unsafe { shim::check(shim::aha_current_stream(device, &mut stream)) };
        status.map(|()| Self(stream)).map_err(LaunchError::NoStream)
    }
}

impl Gpu {
    /// The one that is current on this thread.
    ///
    /// # Errors
    /// If there is no driver, or no current GPU.
    pub fn current() -> Result<Self, LaunchError> {
        /// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
        const ATTRIBUTES: [c_int; 2] = [75, 76];
        let driver = Driver::open()?;
        driver.check_context()?;
        let mut device = 0;
        // SAFETY: the driver writes one number.
        let status = unsafe { (driver.ctx_get_device)(&mut device) };
        driver.check(status, "asking for the current GPU")?;
        let mut numbers = [0; 2];
        for (number, attribute) in numbers.iter_mut().zip(ATTRIBUTES) {
            // SAFETY: the driver writes one number.
            let status = unsafe { (driver.device_get_attribute)(number, attribute, device) };
            driver.check(status, "asking for the GPU's compute capability")?;
        }
        let [major, minor] = numbers.map(|number| number as u32);
        Ok(Self { major, minor })
    }
}

/// Names CUDA device `index` as no other anywhere: `GPU-` and 32 hexadecimal digits.
///
/// # Errors
/// If there is no driver, or no such device.
pub fn gpu_uuid(index: usize) -> Result<String, LaunchError> {
    let driver = Driver::open()?;
    let ordinal = c_int::try_from(index).unwrap_or(c_int::MAX);
    let (mut device, mut uuid) = (0, [0_u8; 16]);
    // SAFETY: no flags; any thread may initialise the driver, any number of times.
    driver.check(unsafe { (driver.init)(0) }, "starting the CUDA driver")?;
    // SAFETY: the driver writes one number.
    driver.check(unsafe { (driver.device_get)(&mut device, ordinal) }, format_args!("finding CUDA device {index}"))?;
    // SAFETY: the driver writes 16 bytes.
    let status = unsafe { (driver.device_get_uuid)(uuid.as_mut_ptr(), device) };
    driver.check(status, format_args!("asking for the UUID of CUDA device {index}"))?;
    Ok(format!("GPU-{:032x}", u128::from_be_bytes(uuid)))
}

impl KernelSet {
    /// Loads every kernel of `programs`, each with its code, onto the current GPU.
    ///
    /// # Errors
    /// If there is no driver, no current GPU, or the code is not for it.
    pub fn load(programs: &[(Program, Vec<u8>)]) -> Result<Self, LaunchError> {
        let driver = Driver::open()?;
        driver.check_context()?;
        let mut functions = HashMap::new();
        for (program, code) in programs {
            let mut module = ptr::null_mut();
            // SAFETY: a CUBIN holds its own length, the compiler or the cache's hash vouches that it is whole, and the
            // driver copies it.
            let status = unsafe { (driver.module_load_data)(&mut module, code.as_ptr().cast()) };
            driver.check(status, format_args!("loading {program}"))?;
            for kernel in program.kernels() {
                let name = CString::new(kernel).unwrap_or_default();
                let mut function = ptr::null_mut();
                // SAFETY: the module was loaded just now, and the name is a string.
                let status = unsafe { (driver.module_get_function)(&mut function, module, name.as_ptr()) };
                driver.check(status, format_args!("finding {kernel} in {program}"))?;
                functions.insert((*program, kernel), function);
            }
        }
        Ok(Self { driver, functions })
    }

    /// Queues a launch. A launch of no blocks does nothing.
    ///
    /// # Errors
    /// If its program was not loaded, or the driver refuses it.
    ///
    /// # Safety
    /// The addresses in the launch are those of memory on this GPU, of the shapes and types that its builder names, and
    /// nothing else uses what it writes until the stream has passed it.
    pub unsafe fn launch(&self, launch: &Launch, stream: Stream) -> Result<(), LaunchError> {
        let Launch { program, kernel, grid, num_threads, ref args } = *launch;
        let function = self.functions.get(&(program, kernel)).ok_or(LaunchError::NotLoaded { program, kernel })?;
        if grid.contains(&0) {
            return Ok(());
        }
        let mut values: Vec<Handle> = args.iter().map(|(value, _)| value.cast_mut()).collect();
        let ([x, y, z], shared_bytes) = (grid, 0);
        // SAFETY: the arguments are those of the kernel (a test compares their sizes), live until the call has copied
        // them, and the caller vouches for what they refer to.
        let status = unsafe {
            let (values, extra) = (values.as_mut_ptr(), ptr::null_mut());
            (self.driver.launch_kernel)(*function, x, y, z, num_threads, 1, 1, shared_bytes, stream.0, values, extra)
        };
        self.driver.check(status, format_args!("launching {kernel} of {program}"))
    }
}

type LaunchFn = unsafe extern "C" fn(
    Handle,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    Handle,
    *mut Handle,
    *mut Handle,
) -> c_int;

/// The functions of cuda.h that are used.
#[derive(Debug, Clone, Copy)]
struct Driver {
    init: unsafe extern "C" fn(c_uint) -> c_int,
    device_get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    device_get_uuid: unsafe extern "C" fn(*mut u8, c_int) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
    ctx_get_current: unsafe extern "C" fn(*mut Handle) -> c_int,
    ctx_get_device: unsafe extern "C" fn(*mut c_int) -> c_int,
    device_get_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
    module_load_data: unsafe extern "C" fn(*mut Handle, *const c_void) -> c_int,
    module_get_function: unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> c_int,
    launch_kernel: LaunchFn,
}

impl Driver {
    fn open() -> Result<Self, LaunchError> {
        let library = Library::open(OsStr::new("libcuda.so.1")).map_err(LaunchError::NoDriver)?;
        // SAFETY: the types are those of cuda.h of CUDA 13.
        let find = || unsafe {
            Ok(Self {
                init: library.function(c"cuInit")?,
                device_get: library.function(c"cuDeviceGet")?,
                device_get_uuid: library.function(c"cuDeviceGetUuid_v2")?,
                get_error_string: library.function(c"cuGetErrorString")?,
                ctx_get_current: library.function(c"cuCtxGetCurrent")?,
                ctx_get_device: library.function(c"cuCtxGetDevice")?,
                device_get_attribute: library.function(c"cuDeviceGetAttribute")?,
                module_load_data: library.function(c"cuModuleLoadData")?,
                module_get_function: library.function(c"cuModuleGetFunction")?,
                launch_kernel: library.function(c"cuLaunchKernel")?,
            })
        };
        find().map_err(LaunchError::NoDriver)
    }

    fn check_context(&self) -> Result<(), LaunchError> {
        let mut context = ptr::null_mut();
        // SAFETY: the driver writes one pointer.
        let status = unsafe { (self.ctx_get_current)(&mut context) };
        // Before its first use in the process the driver is not initialised, which is an error here.
        if status != 0 || context.is_null() { Err(LaunchError::NoContext) } else { Ok(()) }
    }

    fn check(&self, status: c_int, operation: impl ToString) -> Result<(), LaunchError> {
        if status == 0 {
            return Ok(());
        }
        let mut text = ptr::null();
        // SAFETY: the driver writes a pointer to a static string, or null for a number that it does not know.
        let found = unsafe { (self.get_error_string)(status, &mut text) } == 0 && !text.is_null();
        let reason = if found {
            // SAFETY: as above.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        } else {
            format!("CUDA error {status}")
        };
        Err(LaunchError::Driver { operation: operation.to_string(), reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_the_error_says_what_is_missing() {
        if tch::Cuda::is_available() {
            return;
        }
        let error = Stream::current(0).unwrap_err();
        assert!(matches!(&error, LaunchError::NoStream(_)), "{error}");
        let error = KernelSet::load(&[]).unwrap_err();
        assert!(matches!(error, LaunchError::NoDriver(_) | LaunchError::NoContext), "{error}");
        assert!(Gpu::current().is_err() && gpu_uuid(0).is_err());
    }
}
