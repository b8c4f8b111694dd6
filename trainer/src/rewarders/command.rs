//! Asking a program: a line of JSON a batch, and a line with its scores back.
//!
//! `{"id": 7, "completions": [{"prompt": ..., "completion": ..., "columns": {...}, ...}]}` is answered by
//! `{"id": 7, "scores": [1.0, null]}`. What breaks that ends the program, and the next batch starts it anew, because nobody
//! could tell which line answers which.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aha_core::reward::Outcome;
use serde::Deserialize;
use serde_json::Value;

use super::child::Child;
use super::failure::{Failure, Verdict};
use super::question::Question;

/// Bytes of an answer that a message shows.
const SHOWN: usize = 100;

#[derive(Debug)]
pub(super) struct Command {
    command: Vec<String>,
    log: Option<PathBuf>,
    /// None while it answers, and before it is started again.
    child: Mutex<Option<Child>>,
    num_batches: AtomicU64,
}

#[derive(Debug, Deserialize)]
struct Answer {
    id: u64,
    scores: Vec<Value>,
}

impl Command {
    /// Starts it. Must be called within a runtime.
    pub(super) fn start(command: &[String], log: Option<PathBuf>) -> io::Result<Self> {
        let child = Mutex::new(Some(Child::start(command, log.as_deref())?));
        Ok(Self { command: command.to_vec(), log, child, num_batches: AtomicU64::new(0) })
    }

    /// Whether the next batch finds it ready.
    pub(super) fn is_ready(&self) -> bool {
        self.child().as_ref().is_some_and(|child| child.has_answered)
    }

    pub(super) async fn ask(&self, questions: &[Question]) -> Result<Vec<Verdict>, Failure> {
        let known = self.child().take();
        // Whatever goes wrong from here, or if nobody waits any more, it is dropped and with that killed.
        let mut child = known.map_or_else(|| self.restart(), Ok)?;
        let id = self.num_batches.fetch_add(1, Ordering::Relaxed);
        let completions: Vec<String> = questions.iter().map(Question::json).collect();
        let line = format!(r#"{{"id":{id},"completions":[{}]}}"#, completions.join(","));
        let answer = child.exchange(&line).await?;
        let scores = read(&answer, id, questions.len()).map_err(Failure::lied)?;
        *self.child() = Some(child);
        Ok(scores.iter().map(verdict).collect())
    }

    fn restart(&self) -> Result<Child, Failure> {
        let failed = |error| Failure::gone(format!("it cannot be started: {error}"));
        Child::start(&self.command, self.log.as_deref()).map_err(failed)
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(line: &[u8], id: u64, num_questions: usize) -> Result<Vec<Value>, String> {
    let shown = || String::from_utf8_lossy(&line[..line.len().min(SHOWN)]).trim_end().to_owned();
    let answer: Answer = serde_json::from_slice(line).map_err(|error| {
        format!(
            "{:?} is no answer: {error}; standard output is for answers alone, write messages to standard error",
            shown()
        )
    })?;
    if answer.id != id {
        return Err(format!("an answer to batch {} where {id} was asked for: {:?}", answer.id, shown()));
    }
    if answer.scores.len() != num_questions {
        return Err(format!("{} scores for {num_questions} completions", answer.scores.len()));
    }
    Ok(answer.scores)
}

/// A number; `null` for no verdict; or an object with an outcome, and a message where there is no verdict.
fn verdict(score: &Value) -> Verdict {
    let unusable = || {
        let text: String = score.to_string().chars().take(SHOWN).collect();
        Err(format!("{text} is no score, null or {{\"outcome\": \"wrong\"}}, \"unparsable\" or \"no_verdict\""))
    };
    match score {
        Value::Number(score) => score.as_f64().map_or_else(unusable, |score| Ok(Outcome::Score(score as f32))),
        Value::Null => Err("no verdict".to_owned()),
        _ => match score["outcome"].as_str() {
            Some("wrong") => Ok(Outcome::Wrong),
            Some("unparsable") => Ok(Outcome::Unparsable),
            Some("no_verdict") => {
                let message = score["message"].as_str().unwrap_or_default();
                Err(format!("no verdict: {message}"))
            }
            _ => unusable(),
        },
    }
}
