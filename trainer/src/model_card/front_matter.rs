//! What the Hub files a model under: the YAML in front of its card.

use anyhow::Result;
use serde_json::{Value, json};

use super::ModelCard;

impl ModelCard {
    /// YAML without its fences. The licence is not ours to say.
    pub(super) fn front_matter(&self, is_adapter: bool) -> Result<String> {
        let library = if is_adapter { "peft" } else { "transformers" };
        let method =
            if self.is_supervised() { ["sft", "supervised-fine-tuning"] } else { ["grpo", "reinforcement-learning"] };
        let mut matter = json!({"library_name": library, "pipeline_tag": "text-generation"});
        matter["tags"] = std::iter::once("aha").chain(method).collect();
        if let Some(base) = self.base_id() {
            matter["base_model"] = json!(base.as_str());
        }
        if let Some(data) = self.data_id() {
            matter["datasets"] = json!([data.as_str()]);
        }
        if let Some(accuracy) = self.evaluations.last().and_then(|evaluation| evaluation.accuracy) {
            matter["model-index"] = json!([{"name": self.config.run.name, "results": [self.result(accuracy)]}]);
        }
        Ok(serde_saphyr::to_string(&matter)?)
    }

    fn result(&self, accuracy: f64) -> Value {
        let data = self.data_text();
        let kind = self.data_id().map_or_else(|| "custom".to_owned(), |id| id.to_string());
        json!({
            "task": {"type": "text-generation"},
            "dataset": {"name": format!("{data}, held out"), "type": kind},
            "metrics": [{"type": "accuracy", "name": "held-out accuracy", "value": accuracy}],
        })
    }
}
