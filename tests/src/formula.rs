//! Weights by a formula of name and index, the same as in `golden/make_models.py`.

use aha_nn::model_config::ModelConfig;
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

/// fp32 weights of a model.
#[must_use]
pub fn weights(config: &ModelConfig, device: Device) -> Weights {
    let weights = Weights::zeros(config.manifest(), 1, Kind::Float, device);
    for unit_idx in 0..weights.num_units() {
        for (spec, mut view) in weights.manifest.units[unit_idx].params.iter().zip(weights.views(unit_idx)) {
            let seed = fnv1a(&spec.name);
            let values: Vec<f32> = (0..spec.numel() as u64)
                .map(|index| {
                    let unit = (split_mix(index ^ seed) >> 40) as f64 / f64::from(1 << 23) - 1.0;
                    let value = match (spec.name.ends_with("norm.weight"), spec.shape.len()) {
                        (true, _) => 1.0 + 0.1 * unit,
                        (false, 1) => 0.1 * unit,
                        (false, _) => 0.25 * unit,
                    };
                    value as f32
                })
                .collect();
            tch::no_grad(|| view.copy_(&Tensor::from_slice(&values).view_as(&view)));
        }
    }
    weights
}

fn split_mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}
