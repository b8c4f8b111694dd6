//! Folders that `datasets.save_to_disk` writes: Arrow streams, listed in `state.json`.

use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::DatasetError;
use super::folder::{Part, choose, unreadable};

/// Of a data set with splits, a folder each.
pub(super) const DICT_FILE: &str = "dataset_dict.json";
/// Of one split.
pub(super) const STATE_FILE: &str = "state.json";

/// The files of a split of a `DatasetDict`.
pub(super) fn of_dict(path: &Path, part: Part<'_>) -> Result<Vec<PathBuf>, DatasetError> {
    let file = path.join(DICT_FILE);
    let dict = read_json(&file)?;
    let splits = dict["splits"].as_array().ok_or_else(|| unreadable(&file, "it has no list of splits"))?;
    let splits = splits.iter().map(|split| plain_name(&file, split)).collect::<Result<_, _>>()?;
    let split = choose(path, "split", part.split, "train", splits)?;
    of_dataset(&path.join(split), Part { split: None, ..part })
}

/// The files of a `Dataset`.
pub(super) fn of_dataset(path: &Path, part: Part<'_>) -> Result<Vec<PathBuf>, DatasetError> {
    if part.subset.is_some() {
        return Err(unreadable(path, "what datasets.save_to_disk wrote has no subsets; leave it out"));
    }
    let file = path.join(STATE_FILE);
    let state = read_json(&file)?;
    if part.split.is_some() {
        let own = state["_split"].as_str().unwrap_or("train");
        choose(path, "split", part.split, "", vec![own.to_owned()])?;
    }
    let files = state["_data_files"].as_array().ok_or_else(|| unreadable(&file, "it has no list of _data_files"))?;
    files.iter().map(|entry| Ok(path.join(plain_name(&file, &entry["filename"])?))).collect()
}

fn read_json(path: &Path) -> Result<Value, DatasetError> {
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, error))?;
    serde_json::from_str(&text).map_err(|error| unreadable(path, error))
}

/// A name that does not lead out of the folder.
fn plain_name(file: &Path, value: &Value) -> Result<String, DatasetError> {
    let name = value.as_str().unwrap_or_default();
    let mut components = Path::new(name).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(_)), None) => Ok(name.to_owned()),
        _ => Err(unreadable(file, format!("{value} is no plain name"))),
    }
}

#[cfg(test)]
mod tests {
    use crate::dataset::folder::tests::{check, folder};

    #[test]
    fn state_lists_the_files() {
        let state =
            r#"{"_data_files": [{"filename": "data-00001.arrow"}, {"filename": "data-00000.arrow"}], "_split": null}"#;
        let dict = folder(&[
            ("dataset_dict.json", r#"{"splits": ["aime", "amc"]}"#),
            ("aime/state.json", state),
            ("aime/stray.arrow", ""),
            ("amc/state.json", r#"{"_data_files": [{"filename": "../x.arrow"}]}"#),
        ]);
        let root = dict.path();
        check(root, (Some("aime"), None), Ok(&["aime/data-00001.arrow", "aime/data-00000.arrow"]));
        check(root, (None, None), Err("has several splits, [\"aime\", \"amc\"]: set split to one"));
        check(
            root,
            (Some("aim"), None),
            Err("has no split \"aim\"; it has [\"aime\", \"amc\"]; did you mean \"aime\"?"),
        );
        check(root, (Some("amc"), None), Err("\"../x.arrow\" is no plain name"));
        check(root, (Some("aime"), Some("x")), Err("has no subsets"));
        check(&root.join("aime"), (None, None), Ok(&["data-00001.arrow", "data-00000.arrow"]));
        check(&root.join("aime"), (Some("test"), None), Err("has no split \"test\"; it has [\"train\"]"));
        let empty = folder(&[("state.json", "{")]);
        check(empty.path(), (None, None), Err("state.json: EOF"));
    }
}
