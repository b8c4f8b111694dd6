//! The collectives: what each needs of its tensors, how it starts, and what it does in a group of one.

use crate::shim::{
    self, AhaGroup, AhaWork, Message, aha_group_all_gather, aha_group_all_reduce, aha_group_barrier,
    aha_group_broadcast, aha_group_reduce_scatter,
};
use std::ptr;
use tch::{Device, Kind, Tensor};

/// How the values of the ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    Sum,
    Max,
    Min,
}

impl ReduceOp {
    fn code(self) -> i32 {
        match self {
            Self::Sum => 0,
            Self::Max => 1,
            Self::Min => 2,
        }
    }
}

/// One collective and its tensors.
#[derive(Debug)]
pub(super) enum Collective<'a> {
    AllReduce { tensor: &'a mut Tensor, op: ReduceOp },
    ReduceScatter { output: &'a mut Tensor, input: &'a Tensor, op: ReduceOp },
    AllGather { output: &'a mut Tensor, input: &'a Tensor },
    Broadcast { tensor: &'a mut Tensor, root: usize },
    Barrier,
}

impl Collective<'_> {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::AllReduce { .. } => "all_reduce",
            Self::ReduceScatter { .. } => "reduce_scatter",
            Self::AllGather { .. } => "all_gather",
            Self::Broadcast { .. } => "broadcast",
            Self::Barrier => "barrier",
        }
    }

    /// Says what makes this collective impossible in a group of `size` ranks on `device`.
    pub(super) fn check(&self, size: usize, device: Device) -> Result<(), String> {
        for (name, tensor) in self.tensors() {
            check_tensor(name, tensor, device)?;
        }
        match self {
            Self::ReduceScatter { output, input, .. } => check_shards(("input", input), ("output", output), size),
            Self::AllGather { output, input } => check_shards(("output", output), ("input", input), size),
            Self::Broadcast { root, .. } if *root >= size => Err(format!("root {root} is not a rank")),
            Self::AllReduce { .. } | Self::Broadcast { .. } | Self::Barrier => Ok(()),
        }
    }

    /// Operation, elements and kind, which all ranks must agree on.
    pub(super) fn describe(&self) -> String {
        let how = match self {
            Self::AllReduce { op, .. } | Self::ReduceScatter { op, .. } => format!(" ({op:?})"),
            Self::Broadcast { root, .. } => format!(" (from {root})"),
            Self::AllGather { .. } | Self::Barrier => String::new(),
        };
        let what = |(_, tensor): &(_, &Tensor)| format!(" of {} {:?}", tensor.numel(), tensor.kind());
        format!("{}{how}{}", self.name(), self.tensors().first().map(what).unwrap_or_default())
    }

    /// Whether nothing is to be sent. All ranks agree on that, as they agree on the number of elements.
    pub(super) fn is_empty(&self) -> bool {
        let tensors = self.tensors();
        !tensors.is_empty() && tensors.iter().all(|(_, tensor)| tensor.numel() == 0)
    }

    /// References that keep the memory alive while the collective runs.
    pub(super) fn keep_alive(&self) -> Vec<Tensor> {
        self.tensors().into_iter().map(|(_, tensor)| tensor.shallow_clone()).collect()
    }

    /// What the collective comes to in a group of one.
    pub(super) fn run_alone(self) -> Result<(), Message> {
        match self {
            Self::ReduceScatter { output, input, .. } | Self::AllGather { output, input } => {
                let _no_grad = tch::no_grad_guard();
                output.f_copy_(input).map_err(|error| error.to_string())
            }
            Self::AllReduce { .. } | Self::Broadcast { .. } | Self::Barrier => Ok(()),
        }
    }

    /// Issues the collective.
    ///
    /// # Safety
    /// `group` is alive, no other thread issues on it, and [`Collective::check`] has passed. The tensors stay alive and
    /// unread until the work is done.
    pub(super) unsafe fn start(self, group: *mut AhaGroup) -> Result<*mut AhaWork, Message> {
        let mut work = ptr::null_mut();
        let out = &raw mut work;
        // SAFETY: the caller vouches for group and tensors, and `out` outlives the call.
        let message = unsafe {
            match self {
                Self::AllReduce { tensor, op } => aha_group_all_reduce(group, tensor.as_ptr(), op.code(), out),
                Self::ReduceScatter { output, input, op } => {
                    aha_group_reduce_scatter(group, output.as_ptr(), input.as_ptr(), op.code(), out)
                }
                Self::AllGather { output, input } => aha_group_all_gather(group, output.as_ptr(), input.as_ptr(), out),
                Self::Broadcast { tensor, root } => aha_group_broadcast(group, tensor.as_ptr(), root as i64, out),
                Self::Barrier => aha_group_barrier(group, out),
            }
        };
        // SAFETY: the shim returned `message` just now.
        unsafe { shim::check(message) }?;
        Ok(work)
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::AllReduce { tensor, .. } | Self::Broadcast { tensor, .. } => vec![("tensor", &**tensor)],
            Self::ReduceScatter { output, input, .. } | Self::AllGather { output, input } => {
                vec![("input", *input), ("output", &**output)]
            }
            Self::Barrier => Vec::new(),
        }
    }
}

fn check_tensor(name: &str, tensor: &Tensor, device: Device) -> Result<(), String> {
    if !tensor.defined() {
        return Err(format!("{name} is undefined"));
    }
    if tensor.device() != device {
        return Err(format!("{name} is on {:?}, and the group works on {device:?}", tensor.device()));
    }
    let kind = tensor.kind();
    let numeric =
        [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double, Kind::Int64, Kind::Int, Kind::Uint8, Kind::Int8];
    if !numeric.contains(&kind) {
        return Err(format!("{name} is of kind {kind:?}, which no backend can send"));
    }
    if !tensor.is_contiguous() {
        return Err(format!("{name} of shape {:?} is not contiguous", tensor.size()));
    }
    Ok(())
}

/// `whole` must be `size` times `shard`, of the same kind.
fn check_shards(
    (whole_name, whole): (&str, &Tensor),
    (shard_name, shard): (&str, &Tensor),
    size: usize,
) -> Result<(), String> {
    for (name, tensor) in [(whole_name, whole), (shard_name, shard)] {
        if tensor.dim() != 1 {
            return Err(format!("{name} has shape {:?}, and must be flat", tensor.size()));
        }
    }
    if whole.numel() != size * shard.numel() {
        let (wholes, shards) = (whole.numel(), shard.numel());
        return Err(format!("{whole_name} has {wholes} elements, not {size} times the {shards} of {shard_name}"));
    }
    if whole.kind() != shard.kind() {
        return Err(format!("{whole_name} is {:?} and {shard_name} is {:?}", whole.kind(), shard.kind()));
    }
    Ok(())
}
