//! `aha generate`: one prompt through the rollout engine.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use aha_core::chat_template::{ChatTemplate, Ending, Message};
use aha_core::config::Generator;
use aha_core::ids::TokenId;
use aha_core::rollout::{Completion, Sampling};
use aha_core::tokenizer::{SpecialTokens, TokenStream, Tokenizer};
use aha_generator::LocalGenerator;
use aha_generator::engine::TokenEvent;
use aha_trainer::loggers::printable;
use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Placement, network_runtime};
use crate::hub;

/// Complete one prompt with the engine that makes rollouts.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha generate --model models/smollm2-135m --prompt 'What is 2+3?' --greedy --max-tokens 32 --logprobs 3"
)]
pub(crate) struct Args {
    /// Hugging Face model folder, or a repository of the Hub
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    placement: Placement,
    /// The prompt; - reads standard input
    #[arg(long)]
    prompt: String,
    /// Take the prompt as it is, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Always take the most likely token
    #[arg(long, conflicts_with = "temperature")]
    greedy: bool,
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// 0 keeps all tokens
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// Keep tokens at least this likely relative to the most likely one
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    #[arg(long, default_value_t = 128)]
    max_tokens: u32,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End with this string (repeatable)
    #[arg(long)]
    stop: Vec<String>,
    /// Over 1 makes tokens of prompt and completion less likely
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Subtract this from the logits of tokens in the completion, -2 to 2
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtract this from a token's logit as often as it is in the completion, -2 to 2
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Add BIAS to the logit of token id TOKEN (repeatable)
    #[arg(long, value_name = "TOKEN=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(TokenId, f32)>,
    /// Sample none but these token ids; name the end-of-sequence token, too, or only --max-tokens ends the completion
    #[arg(long, value_name = "TOKEN", value_delimiter = ',')]
    allowed_token_ids: Vec<TokenId>,
    /// Never sample these token ids
    #[arg(long, value_name = "TOKEN", value_delimiter = ',')]
    bad_token_ids: Vec<TokenId>,
    /// Give the model's own log-prob of every sampled token, and of the N most likely ones in its place (at most 20)
    #[arg(long, value_name = "N", default_value_t = 0)]
    logprobs: u32,
    /// Give the model's own log-prob of every token of the prompt but the first
    #[arg(long)]
    prompt_logprobs: bool,
    /// Print one JSON object with tokens and log-probs
    #[arg(long)]
    json: bool,
}

impl Args {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: if self.greedy { 0.0 } else { self.temperature },
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.iter().copied().collect(),
            allowed_token_ids: self.allowed_token_ids.clone(),
            bad_token_ids: self.bad_token_ids.clone(),
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            ..Sampling::default()
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let sampling = args.sampling();
    let problems = sampling.problems();
    anyhow::ensure!(problems.is_empty(), "{}", problems.join("; "));
    let model = hub::local_model("--model", &args.model)?;
    let generator = LocalGenerator::load(&args.placement.options(&model, Generator::default())?)?;
    let prompt_tokens = generator.tokenizer().encode(&prompt_text(args, &model)?)?;
    let runtime = network_runtime()?;
    let wants_logprobs = args.logprobs > 0 || args.prompt_logprobs;
    if !args.json && !wants_logprobs && args.stop.is_empty() {
        return runtime.block_on(print_stream(&generator, &prompt_tokens, &sampling, args.seed));
    }
    let completions = runtime.block_on(generator.generate(&prompt_tokens, &sampling, args.seed, 1))?;
    let completion = completions.first().context("the engine returned no completion")?;
    if args.json {
        println!("{}", to_json(&prompt_tokens, completion));
    } else {
        println!("{}", printable(&completion.text));
        print_logprobs(generator.tokenizer(), &prompt_tokens, completion)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn to_json(prompt_tokens: &[TokenId], completion: &Completion) -> Value {
    let mut answer = json!({"prompt_tokens": prompt_tokens, "tokens": completion.token_ids,
        "logprobs": completion.logprobs, "text": completion.text, "finish_reason": completion.finish_reason});
    if !completion.raw_logprobs.is_empty() {
        answer["raw_logprobs"] = completion.raw_logprobs.iter().map(|raw| raw.logprob).collect();
        answer["top_logprobs"] = completion.raw_logprobs.iter().map(|raw| json!(raw.top)).collect();
    }
    if !completion.prompt_logprobs.is_empty() {
        let logprobs = completion.prompt_logprobs.iter().map(|&logprob| logprob.into());
        answer["prompt_logprobs"] = std::iter::once(Value::Null).chain(logprobs).collect();
    }
    answer
}

/// Tables of what was asked for: nothing else is there.
fn print_logprobs(tokenizer: &Tokenizer, prompt: &[TokenId], completion: &Completion) -> Result<()> {
    let text =
        |token: TokenId| -> Result<String> { Ok(format!("{:?}", tokenizer.decode(&[token], SpecialTokens::Keep)?)) };
    if !completion.prompt_logprobs.is_empty() {
        println!("\n{:>8} {:>10}  prompt", "token", "raw");
    }
    for (&token, logprob) in prompt[1..].iter().zip(&completion.prompt_logprobs) {
        println!("{token:>8} {logprob:>10.4}  {}", text(token)?);
    }
    if !completion.raw_logprobs.is_empty() {
        println!("\n{:>8} {:>10} {:>10}  completion, and what was most likely", "token", "sampled", "raw");
    }
    for ((&token, sampled), raw) in completion.token_ids.iter().zip(&completion.logprobs).zip(&completion.raw_logprobs)
    {
        let top: Result<Vec<String>> =
            raw.top.iter().map(|&(token, p)| Ok(format!("{} {p:.4}", text(token)?))).collect();
        println!("{token:>8} {sampled:>10.4} {:>10.4}  {}: {}", raw.logprob, text(token)?, top?.join(", "));
    }
    Ok(())
}

/// `TOKEN=BIAS`.
fn parse_bias(text: &str) -> Result<(TokenId, f32), String> {
    let (token, bias) = text.split_once('=').ok_or("expected TOKEN=BIAS, as in 198=-100")?;
    let token = token.parse().map_err(|_| format!("{token:?} is no token id"))?;
    Ok((token, bias.parse().map_err(|_| format!("{bias:?} is no number"))?))
}

/// Prints text as it is sampled.
async fn print_stream(
    generator: &LocalGenerator,
    prompt: &[TokenId],
    sampling: &Sampling,
    seed: u64,
) -> Result<ExitCode> {
    let mut events = generator.stream(prompt, sampling, seed).await?;
    let tokenizer = generator.tokenizer();
    let mut text = TokenStream::new(SpecialTokens::Skip);
    while let Some(event) = events.recv().await {
        if let TokenEvent::Token { token, .. } = event {
            print!("{}", printable(&text.push(tokenizer, token)?));
            std::io::stdout().flush()?;
        }
        if event.finish().is_some() {
            break;
        }
    }
    println!("{}", printable(&text.finish(tokenizer)?));
    Ok(ExitCode::SUCCESS)
}

fn prompt_text(args: &Args, model: &Path) -> Result<String> {
    let mut prompt = args.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("reading the prompt from standard input")?;
    }
    if args.raw {
        return Ok(prompt);
    }
    let template = ChatTemplate::load(model).context("use --raw for a model without a chat template")?;
    Ok(template.render(&[Message::new("user", &prompt)], Ending::GenerationPrompt, &serde_json::Map::new())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_is_a_token_and_a_number() {
        assert_eq!(parse_bias("198=-1.5"), Ok((198, -1.5)));
        for (text, problem) in [("198", "TOKEN=BIAS"), ("x=1", "\"x\" is no token"), ("1=y", "\"y\" is no number")] {
            assert!(parse_bias(text).unwrap_err().contains(problem), "{text}");
        }
    }
}
