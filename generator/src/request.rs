//! Requests as they come in, checked once, here at the edge.

use std::collections::HashSet;
use std::sync::Arc;

use aha_core::dataset::Row;
use aha_core::ids::{PromptId, TokenId};
use aha_core::reward::{RewardFunction, RewardSpec};
use aha_core::rollout::Sampling;
use aha_proto::v1;

use crate::error::{GeneratorError, invalid};

/// Most samples of one request.
const MAX_SAMPLES: usize = 1024;
/// Most reward functions of one request, and most bytes of one with its options.
const MAX_REWARDS: usize = 64;
const MAX_REWARD_BYTES: usize = 1 << 16;
/// Longest request id, in bytes.
const MAX_REQUEST_ID: usize = 256;

/// What the serving model can take.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub vocab_size: usize,
    /// Longest sequence, prompt and completion together.
    pub max_model_len: usize,
    pub eos_token_ids: Arc<[TokenId]>,
}

/// A request that makes sense.
#[derive(Debug, Clone)]
pub(crate) struct GenerateRequest {
    pub prompt_id: PromptId,
    pub prompt: Vec<TokenId>,
    pub sample_indices: Vec<u32>,
    pub sampling: Sampling,
    pub seed: u64,
    pub rewards: Vec<RewardFunction>,
    pub columns: Row,
}

/// Checks the name that a client gives its request.
///
/// # Errors
/// If there is none, or it is a book.
pub(crate) fn check_request_id(request_id: &str) -> Result<(), GeneratorError> {
    if request_id.is_empty() || request_id.len() > MAX_REQUEST_ID {
        let problem = format!("must have 1 to {MAX_REQUEST_ID} bytes, got {}", request_id.len());
        return Err(invalid("request_id", problem));
    }
    Ok(())
}

impl Limits {
    /// # Errors
    /// Names the first field that is wrong, and says what it must be.
    pub(crate) fn check(&self, wire: v1::GenerateRequest) -> Result<GenerateRequest, GeneratorError> {
        let sampling = wire.sampling.ok_or_else(|| invalid("sampling", "is missing"))?.try_into()?;
        let columns = parse_columns(&wire.columns)?;
        let rewards = parse_rewards(wire.rewards, &columns)?;
        let prompt_id = PromptId(wire.prompt_id);
        let (prompt, sample_indices) = (wire.token_ids, wire.sample_indices);
        let request =
            GenerateRequest { prompt_id, prompt, sample_indices, sampling, seed: wire.seed, rewards, columns };
        self.check_request(&request)?;
        Ok(request)
    }

    /// The part of [`Limits::check`] that callers within this process need too.
    pub(crate) fn check_request(&self, request: &GenerateRequest) -> Result<(), GeneratorError> {
        self.check_sequence(&request.prompt, &request.sampling)?;
        check_samples(&request.sample_indices)
    }

    /// Tokens to be scored.
    pub(crate) fn check_tokens(&self, tokens: &[TokenId]) -> Result<(), GeneratorError> {
        self.check_ids("token_ids", tokens)?;
        if tokens.is_empty() || tokens.len() > self.max_model_len {
            let problem = format!("must have 1 to {} tokens, got {}", self.max_model_len, tokens.len());
            return Err(invalid("token_ids", problem));
        }
        Ok(())
    }

    fn check_sequence(&self, prompt: &[TokenId], sampling: &Sampling) -> Result<(), GeneratorError> {
        let problems = sampling.problems();
        if !problems.is_empty() {
            return Err(invalid("sampling", problems.join("; ")));
        }
        if prompt.is_empty() {
            return Err(invalid("token_ids", "the prompt must have at least 1 token"));
        }
        self.check_ids("token_ids", prompt)?;
        self.check_list("sampling.stop_token_ids", &sampling.stop_token_ids)?;
        self.check_list("sampling.allowed_token_ids", &sampling.allowed_token_ids)?;
        self.check_list("sampling.bad_token_ids", &sampling.bad_token_ids)?;
        self.check_list("sampling.logit_bias", &sampling.logit_bias.keys().copied().collect::<Vec<_>>())?;
        self.check_something_allowed(sampling)?;
        let (len, max_tokens) = (prompt.len(), sampling.max_tokens as usize);
        if len + max_tokens > self.max_model_len {
            let most = self.max_model_len;
            let problem =
                format!("{len} tokens of prompt and {max_tokens} of completion are over max_model_len {most}");
            return Err(invalid("sampling.max_tokens", problem));
        }
        Ok(())
    }

    fn check_list(&self, field: &'static str, tokens: &[TokenId]) -> Result<(), GeneratorError> {
        if tokens.len() > self.vocab_size {
            let problem = format!("has {} tokens, and the vocabulary {}", tokens.len(), self.vocab_size);
            return Err(invalid(field, problem));
        }
        self.check_ids(field, tokens)
    }

    /// The engine would end with a row of logits that leaves nothing to sample.
    fn check_something_allowed(&self, sampling: &Sampling) -> Result<(), GeneratorError> {
        let Sampling { allowed_token_ids: allowed, bad_token_ids: bad, stop_token_ids, .. } = sampling;
        let mut masked: HashSet<TokenId> = bad.iter().copied().collect();
        if sampling.min_tokens > 0 && !sampling.ignore_eos {
            masked.extend(stop_token_ids.iter().chain(&*self.eos_token_ids));
        }
        let (field, is_empty) = match allowed.is_empty() {
            true => ("sampling.bad_token_ids", masked.len() >= self.vocab_size),
            false => ("sampling.allowed_token_ids", allowed.iter().all(|token| masked.contains(token))),
        };
        match is_empty {
            true => {
                Err(invalid(field, "no token is left to sample beside bad_token_ids and what min_tokens holds back"))
            }
            false => Ok(()),
        }
    }

    fn check_ids(&self, field: &'static str, tokens: &[TokenId]) -> Result<(), GeneratorError> {
        match tokens.iter().position(|&token| token as usize >= self.vocab_size) {
            None => Ok(()),
            Some(index) => {
                let (token, vocab_size) = (tokens[index], self.vocab_size);
                Err(invalid(
                    field,
                    format!("token {token} at index {index} is not below the vocabulary's {vocab_size}"),
                ))
            }
        }
    }
}

fn check_samples(indices: &[u32]) -> Result<(), GeneratorError> {
    if indices.is_empty() || indices.len() > MAX_SAMPLES {
        return Err(invalid("sample_indices", format!("must name 1 to {MAX_SAMPLES} samples, got {}", indices.len())));
    }
    let mut seen = HashSet::new();
    match indices.iter().find(|index| !seen.insert(**index)) {
        Some(index) => Err(invalid("sample_indices", format!("{index} is named twice"))),
        None => Ok(()),
    }
}

fn parse_columns(json: &str) -> Result<Row, GeneratorError> {
    if json.is_empty() {
        return Ok(Row::new());
    }
    serde_json::from_str(json).map_err(|error| invalid("columns", format!("must be a JSON object: {error}")))
}

fn parse_rewards(wire: Vec<v1::RewardFunction>, columns: &Row) -> Result<Vec<RewardFunction>, GeneratorError> {
    if wire.len() > MAX_REWARDS {
        return Err(invalid("rewards", format!("must be at most {MAX_REWARDS}, got {}", wire.len())));
    }
    let mut functions: Vec<RewardFunction> = Vec::new();
    for reward in wire {
        let num_bytes = reward.name.len() + reward.function.len() + reward.options.len();
        if num_bytes > MAX_REWARD_BYTES {
            return Err(invalid("rewards", format!("one has {num_bytes} bytes, {MAX_REWARD_BYTES} at most")));
        }
        let spec = RewardSpec::try_from(reward)?;
        let function = RewardFunction::new(&spec).map_err(|error| invalid("rewards", error.to_string()))?;
        if functions.iter().any(|other| other.name() == function.name()) {
            return Err(invalid("rewards", format!("{} is named twice", function.name())));
        }
        function.check_columns(columns).map_err(|error| invalid("columns", error.to_string()))?;
        functions.push(function);
    }
    Ok(functions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits { vocab_size: 100, max_model_len: 64, eos_token_ids: [2].into() }
    }

    fn good() -> v1::GenerateRequest {
        v1::GenerateRequest {
            request_id: "r".to_owned(),
            prompt_id: 7,
            token_ids: vec![1, 99],
            sample_indices: vec![4, 0],
            sampling: Some(v1::Sampling::from(&Sampling { max_tokens: 62, ..Sampling::default() })),
            seed: 3,
            rewards: ["equation", "format"].map(|name| (&RewardSpec::of(name)).into()).to_vec(),
            columns: r#"{"target": 3, "nums": [1, 2]}"#.to_owned(),
        }
    }

    #[test]
    fn a_good_request_passes_whole() {
        let request = limits().check(good()).unwrap();
        assert_eq!((request.prompt_id, request.prompt, request.sample_indices), (PromptId(7), vec![1, 99], vec![4, 0]));
        assert_eq!(request.rewards.iter().map(RewardFunction::name).collect::<Vec<_>>(), ["equation", "format"]);
        let bare = v1::GenerateRequest { rewards: Vec::new(), columns: String::new(), ..good() };
        assert!(limits().check(bare).unwrap().columns.is_empty());
    }

    #[test]
    fn every_bad_field_is_named() {
        type Damage = fn(&mut v1::GenerateRequest);
        let cases: [(&str, &str, Damage); 13] = [
            ("token_ids", "at least 1", |r| r.token_ids.clear()),
            ("token_ids", "token 100 at index 1", |r| r.token_ids[1] = 100),
            ("sample_indices", "got 0", |r| r.sample_indices.clear()),
            ("sample_indices", "got 1025", |r| r.sample_indices = (0..1025).collect()),
            ("sample_indices", "4 is named twice", |r| r.sample_indices.push(4)),
            ("sampling", "missing", |r| r.sampling = None),
            ("sampling.max_tokens", "over max_model_len 64", |r| r.token_ids.push(1)),
            ("rewards", "equasion", |r| r.rewards[0].function = "equasion".to_owned()),
            ("rewards", "asked by trainers alone", |r| r.rewards[0].function = "command".to_owned()),
            ("rewards", "asked by trainers alone", |r| r.rewards[0].function = "rewarder".to_owned()),
            ("rewards", "twice", |r| r.rewards[0].name = "format".to_owned()),
            ("columns", "JSON object", |r| r.columns = "[1]".to_owned()),
            ("columns", "target", |r| r.columns = "{}".to_owned()),
        ];
        for (field, problem, damage) in cases {
            let mut request = good();
            damage(&mut request);
            check_refused(request, field, problem);
        }
    }

    #[track_caller]
    fn check_refused(request: v1::GenerateRequest, field: &str, problem: &str) {
        let error = limits().check(request).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{field}: ")) && error.contains(problem), "{error}");
    }

    #[test]
    fn every_bad_sampling_option_is_named() {
        type Damage = fn(&mut v1::Sampling);
        let cases: [(&str, &str, Damage); 20] = [
            ("sampling", "top_p", |s| s.top_p = 0.0),
            ("sampling", "64 stop strings, got 1000000", |s| s.stop = vec!["x".to_owned(); 1_000_000]),
            ("sampling", "repetition_penalty", |s| s.repetition_penalty = Some(0.0)),
            ("sampling", "repetition_penalty", |s| s.repetition_penalty = Some(f32::INFINITY)),
            ("sampling", "presence_penalty", |s| s.presence_penalty = f32::NAN),
            ("sampling", "frequency_penalty", |s| s.frequency_penalty = -2.5),
            ("sampling", "logit_bias of token 7", |s| s.logit_bias = [(7, f32::NAN)].into()),
            ("sampling", "logprobs must be at most 20, got 21", |s| s.logprobs = 21),
            ("sampling.stop_token_ids", "token 500", |s| s.stop_token_ids = vec![500]),
            ("sampling.stop_token_ids", "has 101 tokens", |s| s.stop_token_ids = vec![1; 101]),
            ("sampling.allowed_token_ids", "token 100 at index 1", |s| s.allowed_token_ids = vec![1, 100]),
            ("sampling.allowed_token_ids", "has 101 tokens", |s| s.allowed_token_ids = vec![1; 101]),
            ("sampling.bad_token_ids", "token 100", |s| s.bad_token_ids = vec![100]),
            ("sampling.bad_token_ids", "has 101 tokens", |s| s.bad_token_ids = vec![1; 101]),
            ("sampling.logit_bias", "token 4000000000", |s| s.logit_bias = [(4_000_000_000, 1.0)].into()),
            ("sampling.logit_bias", "has 101 tokens", |s| s.logit_bias = (0..101).map(|token| (token, 0.0)).collect()),
            ("sampling.bad_token_ids", "no token is left", |s| s.bad_token_ids = (0..100).collect()),
            ("sampling.allowed_token_ids", "no token is left", |s| {
                (s.allowed_token_ids, s.bad_token_ids) = (vec![4, 5], vec![5, 4]);
            }),
            // Token 2 ends a completion, and may not be the first one.
            ("sampling.allowed_token_ids", "no token is left", |s| {
                (s.allowed_token_ids, s.min_tokens, s.stop_token_ids) = (vec![2, 3], 1, vec![3]);
            }),
            ("sampling.bad_token_ids", "no token is left", |s| {
                (s.bad_token_ids, s.min_tokens) = ((0..100).filter(|token| *token != 2).collect(), 1);
            }),
        ];
        for (field, problem, damage) in cases {
            let mut request = good();
            damage(request.sampling.as_mut().unwrap());
            check_refused(request, field, problem);
        }
        let mut allowed = good();
        let sampling = allowed.sampling.as_mut().unwrap();
        (sampling.allowed_token_ids, sampling.bad_token_ids, sampling.min_tokens) = (vec![2, 3, 4], vec![4], 1);
        assert!(limits().check(allowed).is_ok());
    }

    #[test]
    fn a_request_id_is_there_and_short() {
        assert!(check_request_id("r").is_ok());
        for bad in ["", &"r".repeat(257)] {
            assert!(check_request_id(bad).unwrap_err().to_string().starts_with("request_id: "));
        }
    }

    #[test]
    fn scored_tokens_are_bounded() {
        assert!(limits().check_tokens(&[1; 64]).is_ok());
        for bad in [vec![], vec![1; 65], vec![100]] {
            assert!(limits().check_tokens(&bad).unwrap_err().to_string().starts_with("token_ids: "));
        }
    }
}
