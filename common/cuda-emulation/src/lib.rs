//! Runs the CUDA kernels of `aha-nn` on the CPU: the same sources, compiled as C++ over `csrc/emulation.h`.
//!
//! It shows that a kernel computes what it should, and that its threads do not race: what depends on the order in
//! which they run differs between the two [`Order`]s. It says nothing of speed.

use std::ffi::{CStr, c_char, c_void};

/// In which order threads and blocks take their turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Ascending,
    Descending,
}

/// One argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Arg {
    pub value: *const c_void,
    pub size: usize,
}

/// What to run, as for `cuLaunchKernel`.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// The source and its macros, as `build.rs` lists them.
    pub program: &'a str,
    pub kernel: &'a str,
    pub grid: [u32; 3],
    pub num_threads: u32,
    pub args: &'a [Arg],
}

/// Runs every thread of every block.
///
/// # Errors
/// If the program is not one of those in `build.rs`, the arguments do not have the sizes of the kernel's parameters, or
/// the kernel does what CUDA leaves undefined.
///
/// # Safety
/// Each argument points to a value of its parameter's type, and the kernel, given these, stays within memory that
/// nobody else uses.
pub unsafe fn launch(launch: &Launch, order: Order) -> Result<(), String> {
    let Launch { program, kernel, grid, num_threads, args } = launch;
    let entry = KERNELS.iter().find(|known| known.0 == *program && known.1 == *kernel).map(|known| known.2);
    let entry =
        entry.ok_or_else(|| format!("no kernel {kernel} in {program:?}: see build.rs of aha-cuda-emulation"))?;
    let values: Vec<*const c_void> = args.iter().map(|arg| arg.value).collect();
    let sizes: Vec<usize> = args.iter().map(|arg| arg.size).collect();
    let args = Args { values: values.as_ptr(), sizes: sizes.as_ptr(), count: args.len() };
    // SAFETY: `args` describes live arrays; the caller vouches for what their values point to.
    let problem = unsafe { aha_emulated_launch(entry, grid.as_ptr(), *num_threads, &args, order == Order::Descending) };
    if problem.is_null() {
        return Ok(());
    }
    // SAFETY: the message is a string that lives until this thread's next launch.
    let problem = unsafe { CStr::from_ptr(problem) };
    Err(format!("{kernel} of {program:?}: {}", problem.to_string_lossy()))
}

/// Program, kernel, entry.
type Kernel = (&'static str, &'static str, Entry);
type Entry = unsafe extern "C" fn(args: &Args, run: bool) -> *const c_char;

#[repr(C)]
struct Args {
    values: *const *const c_void,
    sizes: *const usize,
    count: usize,
}

unsafe extern "C" {
    fn aha_emulated_launch(
        entry: Entry,
        grid: *const u32,
        num_threads: u32,
        args: &Args,
        reversed: bool,
    ) -> *const c_char;
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

#[cfg(test)]
mod tests {
    use super::*;

    /// What 64 threads wrote.
    fn run(kernel: &str, options: &[i32], order: Order) -> Result<[i32; 64], String> {
        #[repr(align(16))]
        struct Out([i32; 64]);
        let mut out = Out([0; 64]);
        let address = out.0.as_mut_ptr();
        let mut args = vec![Arg { value: (&raw const address).cast(), size: size_of_val(&address) }];
        args.extend(options.iter().map(|option| Arg { value: std::ptr::from_ref(option).cast(), size: 4 }));
        let one = Launch { program: "faults", kernel, grid: [1, 1, 1], num_threads: 64, args: &args };
        // SAFETY: every kernel takes the address of 64 numbers, and `neighbours` one number.
        unsafe { launch(&one, order) }.map(|()| out.0)
    }

    #[test]
    fn what_lacks_a_barrier_depends_on_the_order() {
        let both = |barrier| [Order::Ascending, Order::Descending].map(|o| run("neighbours", &[barrier], o).unwrap());
        let expect = std::array::from_fn(|i| (i as i32 + 1) % 64);
        assert_eq!(both(1), [expect, expect]);
        let [ascending, descending] = both(0);
        assert_ne!(ascending, descending);
    }

    #[test]
    fn what_cuda_leaves_undefined_is_an_error() {
        for (kernel, expect) in [
            ("divided_barrier", "is at a barrier (line"),
            ("missing_lanes", "in a warp operation"),
            ("missing_threads", "for threads that are done"),
            ("misaligned", "16 bytes are read or written"),
            ("past_shared_memory", "past shared memory"),
        ] {
            for order in [Order::Ascending, Order::Descending] {
                let error = run(kernel, &[], order).unwrap_err();
                assert!(error.contains(kernel) && error.contains(expect), "{error}");
            }
        }
        // A failed launch leaves nothing behind.
        run("neighbours", &[1], Order::Ascending).unwrap();
    }

    #[test]
    fn arguments_and_names_are_checked() {
        assert!(run("neighbours", &[], Order::Ascending).unwrap_err().contains("number of arguments"));
        assert!(run("unknown", &[], Order::Ascending).unwrap_err().contains("no kernel unknown"));
    }
}
