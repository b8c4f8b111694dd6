//! One rank's failure is every rank's: outcomes are exchanged where all must go on together or not at all.

use std::fmt::Display;

use aha_nn::comm::{CommError, ProcessGroup};

/// Why not all ranks may go on.
#[derive(Debug)]
pub(crate) enum Disagreement<E> {
    /// This rank's own failure.
    Here(E),
    /// Another rank's, as it words it. The lowest such rank.
    Elsewhere { rank: usize, reason: String },
    /// The exchange itself failed.
    Comm(CommError),
}

const DONE: u8 = 0;
const FAILED: u8 = 1;

/// Exchanges outcomes: what every rank has to tell the others, in the order of ranks, if all of them succeeded.
///
/// All ranks call this at the same place, whatever happened to each before: it is a collective, and fails on ranks that are
/// at different places.
#[track_caller]
pub(crate) fn agree<E: Display>(
    group: &ProcessGroup,
    outcome: Result<Vec<u8>, E>,
) -> Result<Vec<Vec<u8>>, Disagreement<E>> {
    let message = match &outcome {
        Ok(payload) => [&[DONE], payload.as_slice()].concat(),
        Err(error) => [&[FAILED], error.to_string().as_bytes()].concat(),
    };
    let gathered = group.all_gather_bytes(&message);
    if let Err(error) = outcome {
        return Err(Disagreement::Here(error));
    }
    let mut payloads = Vec::new();
    for (rank, mut message) in gathered.map_err(Disagreement::Comm)?.into_iter().enumerate() {
        let payload = message.split_off(1.min(message.len()));
        if message != [DONE] {
            return Err(Disagreement::Elsewhere { rank, reason: String::from_utf8_lossy(&payload).into_owned() });
        }
        payloads.push(payload);
    }
    Ok(payloads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_ranks::run_ranks;

    #[test]
    fn payloads_come_in_the_order_of_ranks() {
        for payloads in run_ranks(3, |group| agree(&group, Ok::<_, String>(vec![group.rank() as u8; 2])).unwrap()) {
            assert_eq!(payloads, [[0, 0], [1, 1], [2, 2]]);
        }
    }

    #[test]
    fn ranks_at_different_places_are_told_so() {
        let said = run_ranks(2, |group| {
            let agreed = match group.rank() {
                0 => agree(&group, Ok::<_, String>(b"written".to_vec())),
                _ => agree(&group, Ok::<_, String>(b"read".to_vec())),
            };
            let Err(Disagreement::Comm(error)) = agreed else { panic!("they agreed: {agreed:?}") };
            error.to_string()
        });
        for text in said {
            assert!(text.contains("out of step") && text.matches("trainer/src/agreement.rs:").count() == 2, "{text}");
        }
    }

    #[test]
    fn one_failure_is_everybodys() {
        let outcomes = run_ranks(3, |group| {
            let own = if group.rank() == 1 { Err("disk full") } else { Ok(Vec::new()) };
            match agree(&group, own).unwrap_err() {
                Disagreement::Here(error) => format!("here: {error}"),
                Disagreement::Elsewhere { rank, reason } => format!("rank {rank}: {reason}"),
                Disagreement::Comm(error) => error.to_string(),
            }
        });
        assert_eq!(outcomes, ["rank 1: disk full", "here: disk full", "rank 1: disk full"]);
    }
}
