//! The configuration in a card: what shaped the model, and nothing of the machines that trained it.

use anyhow::Result;
use serde_json::{Value, json};

use super::{ModelCard, file_name};

/// Sections, and keys of sections, that say where a run took place.
const PLACES: [(&str, &[&str]); 6] = [
    ("security", &[]),
    ("hub", &[]),
    ("logging", &[]),
    ("launch", &[]),
    ("generator", &["addresses", "coordinator", "kernel_cache", "metrics_address"]),
    ("run", &["output_dir"]),
];

impl ModelCard {
    /// Markdown: the resolved configuration, folded.
    pub(super) fn recipe(&self) -> Result<String> {
        // Through text, because a single-precision 0.2 reads "0.2" there, and 0.20000000298 as a value.
        let mut config: Value = serde_json::from_str(&serde_json::to_string(&self.config)?)?;
        for (section, keys) in PLACES {
            let whole = config.as_object_mut().filter(|_| keys.is_empty());
            if let Some(config) = whole {
                config.shift_remove(section);
            }
            for key in keys {
                config[section].as_object_mut().and_then(|section| section.shift_remove(*key));
            }
        }
        let base = self.base_id().map_or_else(|| file_name(&self.config.model.path), |id| id.to_string());
        config["model"]["path"] = json!(base);
        if let Some(path) = self.data_path() {
            config["data"]["path"] = json!(self.data_id().map_or_else(|| file_name(path), |id| id.to_string()));
        }
        let text = serde_saphyr::to_string(&config)?;
        // A prompt may hold fences of its own.
        let fence = "`".repeat(longest_run(&text, '`').max(2) + 1);
        let text = text.trim_end();
        Ok(format!("<details><summary>The configuration</summary>\n\n{fence}yaml\n{text}\n{fence}\n\n</details>\n"))
    }
}

fn longest_run(text: &str, wanted: char) -> usize {
    text.split(|c| c != wanted).map(str::len).max().unwrap_or(0)
}
