//! `aha generate`: one prompt through the rollout engine.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use aha_core::chat_template::{ChatTemplate, Ending, Message};
use aha_core::config::Generator;
use aha_core::ids::TokenId;
use aha_core::rollout::Sampling;
use aha_core::tokenizer::{SpecialTokens, TokenStream};
use aha_generator::LocalGenerator;
use aha_generator::engine::TokenEvent;
use aha_trainer::loggers::printable;
use anyhow::{Context, Result};
use serde_json::json;

use super::{local_options, network_runtime};

/// Complete one prompt with the engine that makes rollouts.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha generate --model models/smollm2-135m --prompt 'What is 2+3?' --greedy --max-tokens 32"
)]
pub(crate) struct Args {
    /// Hugging Face model folder
    #[arg(long)]
    model: PathBuf,
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
    #[arg(long, default_value_t = 128)]
    max_tokens: u32,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End with this string (repeatable)
    #[arg(long)]
    stop: Vec<String>,
    /// Print one JSON object with tokens and log-probs
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let sampling = Sampling {
        temperature: if args.greedy { 0.0 } else { args.temperature },
        top_p: args.top_p,
        top_k: args.top_k,
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        ..Sampling::default()
    };
    let problems = sampling.problems();
    anyhow::ensure!(problems.is_empty(), "{}", problems.join("; "));
    let generator = LocalGenerator::load(&local_options(&args.model, Generator::default()))?;
    let prompt_tokens = generator.tokenizer().encode(&prompt_text(args)?)?;
    let runtime = network_runtime()?;
    if !args.json && args.stop.is_empty() {
        return runtime.block_on(print_stream(&generator, &prompt_tokens, &sampling, args.seed));
    }
    let completions = runtime.block_on(generator.generate(&prompt_tokens, &sampling, args.seed, 1))?;
    let completion = completions.first().context("the engine returned no completion")?;
    if args.json {
        println!(
            "{}",
            json!({"prompt_tokens": prompt_tokens, "tokens": completion.token_ids, "logprobs": completion.logprobs,
                "text": completion.text, "finish_reason": completion.finish_reason})
        );
    } else {
        println!("{}", printable(&completion.text));
    }
    Ok(ExitCode::SUCCESS)
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

fn prompt_text(args: &Args) -> Result<String> {
    let mut prompt = args.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("reading the prompt from standard input")?;
    }
    if args.raw {
        return Ok(prompt);
    }
    let template = ChatTemplate::load(&args.model).context("use --raw for a model without a chat template")?;
    Ok(template.render(&[Message::new("user", &prompt)], Ending::GenerationPrompt, &serde_json::Map::new())?)
}
