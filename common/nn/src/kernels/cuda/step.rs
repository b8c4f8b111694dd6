//! Launch of `step.cu`: from one decoding step to the next without the host.

use super::launch::{Args, Argument};
use super::{DevicePtr, Launch, Program};

/// A row of the step state, an i32 `[StateField::COUNT, stride]` in the GPU's memory. Kernels that read one field get
/// its address ([`StateField::address`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateField {
    /// Input of the next step.
    Token,
    /// Of that token.
    Position,
    /// Keys that the next step sees; 0 for a row that is not in use.
    ContextLen,
    /// Where the key and value of the token go; -1 for a row that is not in use.
    Slot,
    /// Tokens sampled so far.
    NumGenerated,
    MinTokens,
    MaxTokens,
    /// Positions that the row's blocks hold.
    Capacity,
    SeedLow,
    SeedHigh,
    SampleIndex,
    /// For the next sampling, the bits of an fp32.
    Uniform,
    /// Tokens in the log since the host emptied it.
    NumLogged,
    /// [`Outcome`].
    Outcome,
}

/// Why a row left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Running,
    /// It sampled a stop token.
    Stop,
    /// It sampled its last token.
    Length,
    /// Its next token has no block: the host gives it one and sets `Slot` and `ContextLen`.
    NeedsBlocks,
    /// The host must empty its log, and set `Slot` and `ContextLen`.
    LogFull,
    BadLogit,
    NothingAllowed,
}

/// Takes what was sampled and prepares the next step of every row in use.
#[derive(Debug, Clone, Copy)]
pub struct Advance {
    /// `B`.
    pub num_rows: usize,
    /// Rows that the state has room for, at least `B`.
    pub stride: usize,
    /// i32 `[fields, stride]`.
    pub state: DevicePtr,
    /// i32 `[B]`, of sampling, as are the next two.
    pub tokens: DevicePtr,
    pub log_probs: DevicePtr,
    pub statuses: DevicePtr,
    /// i32 `[B, max_blocks]`.
    pub block_tables: DevicePtr,
    pub max_blocks: usize,
    pub block_size: usize,
    /// i32 `[B, max_stops]`, negative past a row's last.
    pub stop_tokens: DevicePtr,
    pub max_stops: usize,
    /// i32 `[B, log_len]`.
    pub logged_tokens: DevicePtr,
    /// fp32 `[B, log_len]`.
    pub logged_log_probs: DevicePtr,
    /// Steps that fit between two looks of the host, at least 1.
    pub log_len: usize,
}

const NUM_THREADS: usize = 128;

impl StateField {
    pub const COUNT: usize = Self::Outcome as usize + 1;

    /// Where the field starts in a state at `state`.
    #[must_use]
    pub fn address(self, state: DevicePtr, stride: usize) -> DevicePtr {
        DevicePtr(state.0 + (self as usize * stride * size_of::<i32>()) as u64)
    }
}

impl Outcome {
    const ALL: [Self; 7] = [
        Self::Running,
        Self::Stop,
        Self::Length,
        Self::NeedsBlocks,
        Self::LogFull,
        Self::BadLogit,
        Self::NothingAllowed,
    ];

    /// What the field holds, if it means anything.
    #[must_use]
    pub fn from_field(value: i32) -> Option<Self> {
        Self::ALL.get(usize::try_from(value).ok()?).copied()
    }
}

impl Advance {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let Self { state, tokens, log_probs, statuses, block_tables, .. } = *self;
        let args = AdvanceArgs {
            state,
            tokens,
            log_probs,
            statuses,
            block_tables,
            stop_tokens: self.stop_tokens,
            logged_tokens: self.logged_tokens,
            logged_log_probs: self.logged_log_probs,
            stride: self.stride as i32,
            num_rows: self.num_rows as i32,
            max_blocks: self.max_blocks as i32,
            block_size: self.block_size as i32,
            max_stops: self.max_stops as i32,
            log_len: self.log_len as i32,
        };
        Launch {
            program: Program::Step,
            kernel: "advance",
            grid: [self.num_rows.div_ceil(NUM_THREADS) as u32, 1, 1],
            num_threads: NUM_THREADS as u32,
            args: Args::default().with(args),
        }
    }
}

/// `Advance` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct AdvanceArgs {
    state: DevicePtr,
    tokens: DevicePtr,
    log_probs: DevicePtr,
    statuses: DevicePtr,
    block_tables: DevicePtr,
    stop_tokens: DevicePtr,
    logged_tokens: DevicePtr,
    logged_log_probs: DevicePtr,
    stride: i32,
    num_rows: i32,
    max_blocks: i32,
    block_size: i32,
    max_stops: i32,
    log_len: i32,
}

impl Argument for AdvanceArgs {}

#[cfg(test)]
#[path = "step_tests.rs"]
mod tests;
