//! What generator and trainer share of libtorch: the transformer, weights, kernels and process groups.

pub mod autograd;
pub mod autograd_ops;
pub mod bandwidth;
pub mod comm;
mod flash_attention;
pub mod forward;
mod function;
mod fused_ops;
pub mod gpu;
pub mod kernels;
pub mod logprob;
pub mod lora;
mod merged_attention;
pub mod model_config;
pub mod model_folder;
pub mod optim;
pub mod packed_attention;
pub mod rotary;
pub mod runtime;
pub mod sharded_weights;
mod shim;
pub mod storage;
pub mod tensor_data;
pub mod transformer;
pub mod unit;
mod varlen_attention;
pub mod weights;
