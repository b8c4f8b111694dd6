//! Shared libraries that are opened at run time, so that machines without CUDA need none of them.

use std::ffi::{CStr, CString, OsStr, c_void};
use std::os::unix::ffi::OsStrExt;

/// An open library. It stays open for the life of the process: what it started may outlive any owner.
#[derive(Debug, Clone, Copy)]
pub(super) struct Library {
    handle: *mut c_void,
}

// SAFETY: a handle of dlopen may be used by any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Opens a path, or a name that the system's loader finds.
    pub(super) fn open(name: &OsStr) -> Result<Self, String> {
        let name = CString::new(name.as_bytes()).map_err(|_| "a library's name holds a zero byte".to_owned())?;
        // SAFETY: `name` is a string. The initialisers that run are those of NVIDIA's libraries. Global, because NVRTC
        // looks for its builtins among what is loaded.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if handle.is_null() { Err(last_error()) } else { Ok(Self { handle }) }
    }

    /// The function `name`.
    ///
    /// # Safety
    /// `F` is the type of a pointer to that function.
    pub(super) unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F, String> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        // SAFETY: the handle is open, and `name` a string.
        let address = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        if address.is_null() {
            return Err(last_error());
        }
        // SAFETY: `address` is that of the function, and the caller vouches for the type.
        Ok(unsafe { std::mem::transmute_copy(&address) })
    }
}

fn last_error() -> String {
    // SAFETY: dlerror returns null or a string that lives until this thread's next call of it.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "unknown error".to_owned();
    }
    // SAFETY: as above.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let error = Library::open(OsStr::new("libaha-no-such-library.so.1")).unwrap_err();
        assert!(error.contains("libaha-no-such-library.so.1"), "{error}");
        let libc = Library::open(OsStr::new("libc.so.6")).unwrap();
        // SAFETY: the function does not exist.
        let error = unsafe { libc.function::<extern "C" fn()>(c"aha_no_such_function") }.unwrap_err();
        assert!(error.contains("aha_no_such_function"), "{error}");
        // SAFETY: getpid has this type.
        let getpid = unsafe { libc.function::<extern "C" fn() -> i32>(c"getpid") }.unwrap();
        assert_eq!(getpid() as u32, std::process::id());
    }
}
