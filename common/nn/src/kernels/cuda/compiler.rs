//! NVRTC: CUDA C++ to code for one GPU, without a toolkit and without a GPU.

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use super::Program;
use super::library::Library;
use super::program::HEADER;

/// A GPU's compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gpu {
    pub major: u32,
    pub minor: u32,
}

/// NVRTC, opened.
#[derive(Debug, Clone, Copy)]
pub struct Compiler {
    version: (c_int, c_int),
    functions: Functions,
}

#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// Not installed with the wheel beside libtorch, and not known to the system's loader.
    #[error(
        "cannot open NVRTC, which compiles the GPU kernels: {reason}; install the wheel nvidia-cuda-nvrtc beside torch's"
    )]
    NoCompiler { reason: String },
    /// A bug in a kernel, or a GPU that this NVRTC does not know.
    #[error("cannot compile {program} for {architecture}: {reason}\n{log}")]
    Failed { program: String, architecture: String, reason: String, log: String },
    #[error("cannot keep compiled kernels in {path}: {source}", path = path.display())]
    Cache { path: PathBuf, source: std::io::Error },
}

/// The libraries, as CUDA 13 names them. NVRTC opens its builtins by name only, so they come first.
const LIBRARIES: [&str; 2] = ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"];
/// Where the wheels beside torch's keep them.
const WHEEL_DIR: &str = "nvidia/cu13/lib";

impl Gpu {
    /// What NVRTC calls it. From 9.0 on with the instructions that this GPU alone has: code is never moved to another.
    #[must_use]
    pub fn architecture(self) -> String {
        let Self { major, minor } = self;
        format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
    }
}

impl Compiler {
    /// Opens NVRTC of the wheels beside libtorch, or else the one that the system's loader finds.
    ///
    /// # Errors
    /// [`CompileError::NoCompiler`] if there is neither.
    pub fn open() -> Result<Self, CompileError> {
        let open = |dir: &Path| {
            let [builtins, nvrtc] = LIBRARIES.map(|name| Library::open(OsStr::new(&dir.join(name))));
            builtins.and(nvrtc)
        };
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let site = loaded_torch_site(&maps).ok_or_else(|| "libtorch is not loaded".to_owned());
        let opened = site
            .and_then(|site| open(&site.join(WHEEL_DIR)))
            .or_else(|_| open(Path::new("")))
            .and_then(Self::with_library);
        opened.map_err(|reason| CompileError::NoCompiler { reason })
    }

    fn with_library(library: Library) -> Result<Self, String> {
        let functions = Functions::find(library)?;
        let mut version = (0, 0);
        // SAFETY: NVRTC writes two integers.
        let status = unsafe { (functions.version)(&mut version.0, &mut version.1) };
        functions.check(status)?;
        Ok(Self { version, functions })
    }

    /// All that the code depends on besides the source.
    pub(super) fn options(&self, program: &Program, gpu: Gpu) -> Vec<String> {
        let (major, minor) = self.version;
        let macros = program.macros().into_iter().map(|(name, value)| format!("--define-macro={name}={value}"));
        let mut options = vec![
            format!("--gpu-architecture={}", gpu.architecture()),
            "--std=c++17".to_owned(),
            // Nothing reads it but the cache's key.
            format!("--define-macro=NVRTC_VERSION={major}{minor:02}"),
        ];
        options.extend(macros);
        options
    }

    /// Code of a program, a CUBIN.
    ///
    /// # Errors
    /// [`CompileError::Failed`] with NVRTC's log.
    pub fn compile(&self, program: &Program, gpu: Gpu) -> Result<Vec<u8>, CompileError> {
        let options = self.options(program, gpu);
        self.compile_source(program.name(), program.source(), &options).map_err(|(reason, log)| CompileError::Failed {
            program: program.to_string(),
            architecture: gpu.architecture(),
            reason,
            log,
        })
    }

    /// The error is a reason and a log.
    fn compile_source(&self, name: &str, source: &str, options: &[String]) -> Result<Vec<u8>, (String, String)> {
        let text = |text: &str| CString::new(text).map_err(|_| ("a zero byte in a source".to_owned(), String::new()));
        let without_log = |reason| (reason, String::new());
        let (source, name) = (text(source)?, text(&format!("{name}.cu"))?);
        let (header_name, header) = (text(HEADER.0)?, text(HEADER.1)?);
        let options = options.iter().map(|option| text(option)).collect::<Result<Vec<_>, _>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();

        let f = &self.functions;
        let mut program = OpenProgram { functions: f, handle: ptr::null_mut() };
        let (headers, header_names) = ([header.as_ptr()], [header_name.as_ptr()]);
        // SAFETY: all strings and arrays live until the call returns; NVRTC copies what it keeps.
        let status = unsafe {
            let (headers, header_names) = (headers.as_ptr(), header_names.as_ptr());
            (f.create)(&mut program.handle, source.as_ptr(), name.as_ptr(), 1, headers, header_names)
        };
        f.check(status).map_err(without_log)?;
        // SAFETY: the program was created just now, and the options live.
        let status = unsafe { (f.compile)(program.handle, options.len() as c_int, options.as_ptr()) };
        f.check(status).map_err(|reason| (reason, program.log()))?;
        // SAFETY: both functions belong to a program that was compiled.
        unsafe { program.bytes(f.code_size, f.code) }.map_err(without_log)
    }
}

/// The folder of Python packages whose `torch/lib` this process has loaded libtorch from, by its memory map.
fn loaded_torch_site(maps: &str) -> Option<PathBuf> {
    // Address, permissions, offset, device and inode come before the path.
    let mut paths = maps.lines().filter_map(|line| Some(Path::new(&line[line.find('/')?..])));
    let library = paths.find(|path| path.file_name().is_some_and(|name| name == "libtorch_cpu.so"))?;
    Some(library.parent()?.parent()?.parent()?.to_owned())
}

/// A program of NVRTC.
struct OpenProgram<'a> {
    functions: &'a Functions,
    handle: *mut c_void,
}

impl OpenProgram<'_> {
    fn log(&self) -> String {
        // SAFETY: the program exists, and these belong together.
        let log = unsafe { self.bytes(self.functions.log_size, self.functions.log) };
        log.map_or_else(|error| error, |log| String::from_utf8_lossy(&log).trim_matches(['\0', '\n']).to_owned())
    }

    /// # Safety
    /// `read` writes as many bytes as `size` says.
    unsafe fn bytes(&self, size: SizeFn, read: ReadFn) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: the program exists, and NVRTC writes one number.
        self.functions.check(unsafe { size(self.handle, &mut len) })?;
        let mut bytes = vec![0; len];
        // SAFETY: there is room for what the caller vouches is written.
        self.functions.check(unsafe { read(self.handle, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for OpenProgram<'_> {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: the program was created, and nobody uses it any more. There is nothing to do about a failure.
            unsafe { (self.functions.destroy)(&mut self.handle) };
        }
    }
}

type SizeFn = unsafe extern "C" fn(*mut c_void, *mut usize) -> c_int;
type ReadFn = unsafe extern "C" fn(*mut c_void, *mut c_char) -> c_int;
type CreateFn = unsafe extern "C" fn(
    *mut *mut c_void,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;

/// The functions of nvrtc.h that are used.
#[derive(Debug, Clone, Copy)]
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    create: CreateFn,
    compile: unsafe extern "C" fn(*mut c_void, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut *mut c_void) -> c_int,
    log_size: SizeFn,
    log: ReadFn,
    code_size: SizeFn,
    code: ReadFn,
}

impl Functions {
    fn find(library: Library) -> Result<Self, String> {
        // SAFETY: the types are those of nvrtc.h of CUDA 13.
        unsafe {
            Ok(Self {
                version: library.function(c"nvrtcVersion")?,
                error_string: library.function(c"nvrtcGetErrorString")?,
                create: library.function(c"nvrtcCreateProgram")?,
                compile: library.function(c"nvrtcCompileProgram")?,
                destroy: library.function(c"nvrtcDestroyProgram")?,
                log_size: library.function(c"nvrtcGetProgramLogSize")?,
                log: library.function(c"nvrtcGetProgramLog")?,
                code_size: library.function(c"nvrtcGetCUBINSize")?,
                code: library.function(c"nvrtcGetCUBIN")?,
            })
        }
    }

    fn check(&self, status: c_int) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC returns a static string for any number.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        Err(text.to_string_lossy().into_owned())
    }
}

#[cfg(test)]
#[path = "compiler_tests.rs"]
mod tests;
