//! Without the feature `hub`, models are folders.

use std::path::PathBuf;

use aha_core::config::RunConfig;
use aha_trainer::checkpoint_sink::CheckpointSink;
use anyhow::{Result, bail};

use super::{Download, Kind, Push};

const REBUILD: &str =
    "this binary was built without the Hugging Face Hub: build it with `cargo build --release -p aha --features hub`";

pub(crate) fn download(download: &Download) -> Result<PathBuf> {
    let Download { source, kind, local_dir, .. } = download;
    let folder = local_dir.clone().unwrap_or_else(|| PathBuf::from("models").join(source.id.name()));
    let kind = if *kind == Kind::Dataset { " --repo-type dataset" } else { "" };
    bail!(
        "{REBUILD}, or fetch it with `huggingface-cli download {}{kind} --revision {} --local-dir {}` (or `hf download`, as \
         it is called today) and name that folder",
        source.id,
        source.revision,
        folder.display()
    )
}

pub(crate) fn push(push: &Push) -> Result<String> {
    let Push { folder, id, revision, is_private, message, with_trainer_state } = push;
    let private = if *is_private { " --private" } else { "" };
    let exclude = if *with_trainer_state { "" } else { " --exclude 'trainer_state/*'" };
    bail!(
        "{REBUILD}, or push it with `huggingface-cli upload {id} {} --revision {revision} --commit-message \"{message}\"\
         {private}{exclude}` (or `hf upload`, as it is called today)",
        folder.display()
    )
}

pub(crate) fn checkpoint_sink(config: &RunConfig) -> Result<Option<Box<dyn CheckpointSink>>> {
    if config.hub.push { bail!("hub.push: {REBUILD}, or set hub.push: false") } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::hub::local_model;

    #[test]
    fn who_names_a_repository_is_told_how_to_get_it() {
        let error = format!("{:#}", local_model("model.path", Path::new("Qwen/Qwen2.5-0.5B@v1")).unwrap_err());
        for expect in [
            "model.path: no folder Qwen/",
            "--features hub",
            "huggingface-cli download Qwen/Qwen2.5-0.5B --revision v1",
        ] {
            assert!(error.contains(expect), "no {expect:?} in: {error}");
        }
        for path in ["absent", ".", "/no/such/folder", "models/a/b"] {
            assert_eq!(local_model("model.path", Path::new(path)).unwrap(), Path::new(path));
        }
        let mut config = RunConfig::default();
        assert!(checkpoint_sink(&config).unwrap().is_none());
        config.hub.push = true;
        assert!(checkpoint_sink(&config).unwrap_err().to_string().starts_with("hub.push: "));
    }
}
