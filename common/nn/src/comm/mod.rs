//! Process groups: ranks that meet at a store and exchange tensors (c10d of libtorch, through the shim).
//!
//! Everything here has a deadline. A collective that misses it, or whose peer is gone, fails with an error that names
//! group, operation and rank; the group is then closed, and its members make a new one under another name.

mod bytes;
mod collective;
mod deadline;
mod error;
mod group;
mod names;
mod note;
mod roll_call;
mod store;
#[cfg(test)]
mod tests;
mod work;

pub use collective::ReduceOp;
pub use error::CommError;
pub use group::{Address, Backend, GroupSpec, ProcessGroup, nccl_built};
pub use names::{NameError, address_towards, host_and_port, listen};
pub use store::Store;
pub use work::Work;
