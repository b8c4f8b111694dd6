//! Messages of the protocol, as checkpoints and generators send them: refused, or the same when they are sent on.
#![no_main]

use aha_core::rollout::{Completion, Sampling};
use aha_proto::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => {
            let Ok(message) = v1::Completion::decode(bytes) else { return };
            let Ok(completion) = Completion::try_from(message) else { return };
            let again =
                Completion::try_from(v1::Completion::from(completion.clone())).expect("what was taken is taken");
            // Debug, because NaN is no other NaN.
            assert_eq!(format!("{again:?}"), format!("{completion:?}"));
        }
        1 => {
            let Ok(message) = v1::Sampling::decode(bytes) else { return };
            let Ok(sampling) = Sampling::try_from(message) else { return };
            let again = Sampling::try_from(v1::Sampling::from(&sampling)).expect("what was taken is taken");
            assert_eq!(format!("{again:?}"), format!("{sampling:?}"));
            drop(sampling.problems());
        }
        _ => drop(v1::ReceivedRollouts::decode(bytes)),
    }
});
