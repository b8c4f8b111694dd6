//! `aha score`: log-probs of given tokens, through either side's real path.

use std::path::PathBuf;
use std::process::ExitCode;

use aha_core::config::Generator;
use aha_core::ids::TokenId;
use aha_core::tokenizer::Tokenizer;
use aha_generator::LocalGenerator;
use aha_nn::forward;
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::load_weights;
use aha_nn::weights::Weights;
use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{LoadFormat, Placement, Quantize, network_runtime};

/// Print the log-prob of every token of a text, given those before it.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  aha score --model models/smollm2-135m --text 'The capital of France is Paris.' --engine generator"
)]
pub(crate) struct Args {
    /// Hugging Face model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    placement: Placement,
    /// Text to score, tokenised as it is
    #[arg(long, required_unless_present = "tokens", conflicts_with = "tokens")]
    text: Option<String>,
    /// Token ids to score: 1,2,3
    #[arg(long, value_delimiter = ',')]
    tokens: Option<Vec<TokenId>>,
    /// Whose forward pass computes them
    #[arg(long, value_enum, default_value_t = Engine::Trainer)]
    engine: Engine,
    /// How the generator stores the layers' matrices
    #[arg(long, value_enum, default_value_t = Quantize::None)]
    quantization: Quantize,
    /// Print one JSON object: {"tokens": [..], "logprobs": [null, ..]}
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Engine {
    Trainer,
    Generator,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let config = ModelConfig::load(&args.model)?;
    let tokens = match (&args.tokens, &args.text) {
        (Some(tokens), _) => tokens.clone(),
        (None, text) => Tokenizer::load(&args.model)?.encode(text.as_deref().unwrap_or_default())?,
    };
    ensure!(!tokens.is_empty(), "there is no token to score");
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= config.vocab_size) {
        anyhow::bail!("token {token} is outside the model's vocabulary of {}", config.vocab_size);
    }
    ensure!(
        matches!((args.engine, args.quantization), (Engine::Generator, _) | (_, Quantize::None)),
        "--quantization is the generator's: add --engine generator"
    );
    let logprobs = match args.engine {
        Engine::Trainer => {
            let (kind, device) = (args.placement.kind()?, args.placement.device()?);
            let weights = match args.placement.load_format {
                LoadFormat::Safetensors => load_weights(&args.model, &config, 1, kind, device)?,
                LoadFormat::Dummy => Weights::random(&config, 0, 1, kind, device),
            };
            forward::score(&config, &weights, &tokens)
        }
        Engine::Generator => {
            let options = Generator { quantization: args.quantization.into(), ..Generator::default() };
            let generator = LocalGenerator::load(&args.placement.options(&args.model, options)?)?;
            network_runtime()?.block_on(generator.score(&tokens))?
        }
    };
    if args.json {
        let logprobs: Vec<Value> =
            std::iter::once(Value::Null).chain(logprobs.iter().map(|&logprob| logprob.into())).collect();
        println!("{}", json!({"tokens": tokens, "logprobs": logprobs}));
    } else {
        let total: f64 = logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
        for (token, logprob) in tokens[1..].iter().zip(&logprobs) {
            println!("{token:>8} {logprob:>12.6}");
        }
        println!("{} tokens, mean log-prob {:.6}", tokens.len(), total / logprobs.len().max(1) as f64);
    }
    Ok(ExitCode::SUCCESS)
}
