//! The card of a Hugging Face data set: the head of README.md lists subsets ("configs"), their splits and their files.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::DatasetError;
use super::folder::{Format, Part, by_names, choose, list, unreadable};
use super::glob::matches;

const CARD_FILE: &str = "README.md";
/// Bytes of a card that are read: the head comes first.
const MAX_BYTES: u64 = 1 << 20;

/// The files that the card names for a part; `None` where there is no card, or it names none.
pub(super) fn data_files(path: &Path, part: Part<'_>) -> Result<Option<Vec<PathBuf>>, DatasetError> {
    let card = path.join(CARD_FILE);
    let Some(configs) = configs(&card)? else { return Ok(None) };
    let name = |config: &Value| config["config_name"].as_str().unwrap_or("default").to_owned();
    let marked = configs.iter().find(|config| config["default"] == Value::Bool(true));
    let preferred = marked.map_or_else(|| "default".to_owned(), name);
    let subset = choose(path, "subset", part.subset, &preferred, configs.iter().map(name).collect())?;
    let Some(config) = configs.iter().find(|config| name(config) == subset) else { return Ok(None) };
    let splits = splits(&config["data_files"]);
    if splits.is_empty() {
        return match config["data_dir"].as_str() {
            Some(folder) if list(path)?.iter().any(|file| file.starts_with(&format!("{folder}/"))) => {
                by_names(&path.join(folder), part.split).map(Some)
            }
            Some(folder) => Err(unreadable(&card, format!("its data_dir {folder:?} is not there"))),
            None if configs.len() == 1 => Ok(None),
            None => Err(unreadable(&card, format!("it names no files for the subset {subset:?}"))),
        };
    }
    let names = splits.iter().map(|(split, _)| split.clone()).collect();
    let split = choose(path, "split", part.split, "train", names)?;
    let patterns = splits.into_iter().filter(|(name, _)| *name == split).flat_map(|(_, patterns)| patterns);
    let mut files = Vec::new();
    for pattern in patterns {
        files.extend(expand(path, &pattern)?);
    }
    Ok(Some(files))
}

/// The list at `configs` in what stands between the first two lines of `---`.
fn configs(card: &Path) -> Result<Option<Vec<Value>>, DatasetError> {
    let mut bytes = Vec::new();
    match std::fs::File::open(card) {
        Ok(file) => file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(|error| unreadable(card, error))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(card, error)),
    };
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines();
    if lines.next().map(str::trim_end) != Some("---") {
        return Ok(None);
    }
    let head: String = lines.take_while(|line| line.trim_end() != "---").flat_map(|line| [line, "\n"]).collect();
    let head: Value =
        serde_saphyr::from_str(&head).map_err(|error| unreadable(card, format!("its head is no YAML: {error}")))?;
    Ok(head["configs"].as_array().filter(|configs| !configs.is_empty()).cloned())
}

/// Names of splits and their patterns, in the card's order: `data_files` is a pattern, a list of them, or a list of
/// `split` and `path`.
fn splits(data_files: &Value) -> Vec<(String, Vec<String>)> {
    let patterns = |value: &Value| -> Vec<String> {
        let all = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        all.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let plain = patterns(data_files);
    if !plain.is_empty() {
        return vec![("train".to_owned(), plain)];
    }
    let entries = data_files.as_array().into_iter().flatten();
    entries.filter_map(|entry| Some((entry["split"].as_str()?.to_owned(), patterns(&entry["path"])))).collect()
}

fn expand(root: &Path, pattern: &str) -> Result<Vec<PathBuf>, DatasetError> {
    let card = root.join(CARD_FILE);
    let files: Vec<String> = list(root)?.into_iter().filter(|file| matches(pattern, file)).collect();
    if files.is_empty() {
        let reason = format!("it names {pattern:?}, and no such file is there: fetch the data set whole");
        return Err(unreadable(&card, reason));
    }
    if let Some(file) = files.iter().find(|file| Format::of(Path::new(file)).is_none()) {
        return Err(unreadable(&root.join(file), format!("its name must end in {}", Format::NAMES)));
    }
    Ok(files.iter().map(|file| root.join(file)).collect())
}

#[cfg(test)]
mod tests {
    use crate::dataset::folder::tests::{check, folder};

    const MAIN: [&str; 2] = ["main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"];
    const OTHER: &str = "socratic/train-00000-of-00001.parquet";

    fn with_card(card: &str) -> tempfile::TempDir {
        folder(&[("README.md", card), (MAIN[0], ""), (MAIN[1], ""), (OTHER, ""), (".cache/huggingface/x.parquet", "")])
    }

    /// The head of openai/gsm8k's card, in short.
    const GSM8K: &str = "---\nlicense: mit\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    \
        path: main/train-*\n  - split: test\n    path: main/test-*\n- config_name: socratic\n  data_files:\n  \
        - split: train\n    path:\n    - socratic/train-*\n---\n# GSM8K\n";

    #[test]
    fn the_card_names_the_files_of_a_part() {
        let hub = with_card(GSM8K);
        let root = hub.path();
        check(root, (None, Some("main")), Ok(&MAIN[..1]));
        check(root, (Some("test"), Some("main")), Ok(&MAIN[1..]));
        check(root, (None, Some("socratic")), Ok(&[OTHER]));
        check(root, (None, None), Err("has several subsets, [\"main\", \"socratic\"]: set subset to one"));
        check(root, (None, Some("mian")), Err("has no subset \"mian\"; it has [\"main\", \"socratic\"]; did you mean"));
        check(
            root,
            (Some("tests"), Some("main")),
            Err("has no split \"tests\"; it has [\"train\", \"test\"]; did you"),
        );
        let marked = GSM8K.replace("name: socratic", "name: socratic\n  default: true");
        check(with_card(&marked).path(), (None, None), Ok(&[OTHER]));
    }

    #[test]
    fn all_ways_to_name_files_are_read() {
        let config = |rest: &str| with_card(&format!("---\nconfigs:\n- config_name: default\n  {rest}\n---\n"));
        check(config("data_files: 'main/train-*'").path(), (None, None), Ok(&MAIN[..1]));
        check(config("data_files: ['**/train-*', '*/test*']").path(), (None, None), Ok(&[MAIN[0], OTHER, MAIN[1]]));
        check(config("data_dir: socratic").path(), (None, None), Ok(&[OTHER]));
        check(config("data_dir: ../elsewhere").path(), (None, None), Err("data_dir \"../elsewhere\" is not there"));
        check(
            config("data_files: 'main/valid-*'").path(),
            (None, None),
            Err("it names \"main/valid-*\", and no such file"),
        );
        check(config("data_files: 'README.*'").path(), (None, None), Err("README.md: its name must end in .jsonl"));
        check(with_card("---\nconfigs: [\n---\n").path(), (None, None), Err("README.md: its head is no YAML"));
        // Cards that name no files leave it to the files' names.
        for card in ["# Data\n", "---\nlicense: mit\n---\n", ""] {
            check(with_card(card).path(), (Some("test"), None), Ok(&MAIN[1..]));
        }
    }
}
