//! Which files a data set is made of: one file, a folder of them, or a folder as Hugging Face's tools leave it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{DatasetError, card, saved};
use crate::nearest::hint;

/// Folders below the data set's that are looked into.
const MAX_DEPTH: usize = 8;
/// Files of a folder that are looked at.
const MAX_FILES: usize = 100_000;

/// The split that training means.
const TRAIN: &str = "train";

/// Words in names of files and folders that say which split is in them, as Hugging Face reads them.
const SPLIT_WORDS: [(&str, &[&str]); 3] = [
    (TRAIN, &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Names before `-00000-of-00001` that are no splits.
const PLAIN_SHARDS: [&str; 3] = ["data", "part", "shard"];

/// What is read of a data set that has several parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Part<'a> {
    /// Unset takes `train`, or the only one.
    pub split: Option<&'a str>,
    /// Unset takes the default one, or the only one.
    pub subset: Option<&'a str>,
}

/// How a file is read, by the end of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    JsonLines,
    /// A list of objects, or lines of them.
    Json,
    Csv,
    Tsv,
    Parquet,
    Arrow,
}

impl Format {
    pub(super) const NAMES: &str = ".jsonl, .json, .csv, .tsv, .parquet or .arrow";

    pub(super) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "jsonl" => Some(Self::JsonLines),
            "json" => Some(Self::Json),
            "csv" => Some(Self::Csv),
            "tsv" => Some(Self::Tsv),
            "parquet" => Some(Self::Parquet),
            "arrow" => Some(Self::Arrow),
            _ => None,
        }
    }
}

/// The files of a part of the data set at `path`, in the order in which they are read.
pub(super) fn data_files(path: &Path, part: Part<'_>) -> Result<Vec<PathBuf>, DatasetError> {
    let metadata = std::fs::metadata(path).map_err(|error| unreadable(path, error))?;
    if metadata.is_dir() {
        return if path.join(saved::DICT_FILE).is_file() {
            saved::of_dict(path, part)
        } else if path.join(saved::STATE_FILE).is_file() {
            saved::of_dataset(path, part)
        } else {
            of_folder(path, part)
        };
    }
    if part != Part::default() {
        return Err(unreadable(path, "a file has no split or subset to choose; name its folder, or leave them out"));
    }
    match Format::of(path) {
        Some(_) => Ok(vec![path.to_owned()]),
        None => Err(unreadable(path, format!("its name must end in {}", Format::NAMES))),
    }
}

fn of_folder(path: &Path, part: Part<'_>) -> Result<Vec<PathBuf>, DatasetError> {
    if let Some(files) = card::data_files(path, part)? {
        return Ok(files);
    }
    match part.subset {
        None => by_names(path, part.split),
        Some(subset) => {
            let mut there = Vec::new();
            for entry in std::fs::read_dir(path).map_err(|error| unreadable(path, error))? {
                let entry = entry.map_err(|error| unreadable(path, error))?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if entry.path().is_dir() && !name.starts_with('.') {
                    there.push(name);
                }
            }
            there.sort();
            let subset = choose(path, "subset", Some(subset), "", there)?;
            by_names(&path.join(subset), part.split)
        }
    }
}

/// The files of a split, by what their names and their folders' say.
pub(super) fn by_names(path: &Path, split: Option<&str>) -> Result<Vec<PathBuf>, DatasetError> {
    let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut unnamed = Vec::new();
    for file in list(path)? {
        match (Format::of(Path::new(&file)), split_of(&file)) {
            (Some(_), Some(split)) => splits.entry(split).or_default().push(file),
            // A folder may hold other JSON beside the data, such as dataset_infos.json.
            (Some(Format::Json) | None, None) | (None, Some(_)) => {}
            (Some(_), None) => unnamed.push(file),
        }
    }
    if splits.is_empty() {
        splits.insert(TRAIN.to_owned(), unnamed);
    }
    if splits.values().all(Vec::is_empty) {
        return Err(unreadable(path, format!("the folder holds no {} file", Format::NAMES)));
    }
    let split = choose(path, "split", split, TRAIN, splits.keys().cloned().collect())?;
    let files = splits.remove(&split).unwrap_or_default();
    let format = |file: &String| Format::of(Path::new(file));
    if let Some(other) = files.iter().find(|file| format(file) != format(&files[0])) {
        let reason = format!("{:?} and {other:?} are of different formats: name one of them", files[0]);
        return Err(unreadable(path, reason));
    }
    Ok(files.iter().map(|file| path.join(file)).collect())
}

/// Every file below a folder, with `/` between names and sorted; hidden ones are left out.
pub(super) fn list(root: &Path) -> Result<Vec<String>, DatasetError> {
    let mut files = Vec::new();
    let mut folders = vec![(root.to_owned(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(|error| unreadable(&folder, error))? {
            let path = entry.map_err(|error| unreadable(&folder, error))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if name.starts_with('.') || name.starts_with("__") {
                continue;
            }
            let relative = format!("{prefix}{name}");
            if !path.is_dir() {
                files.push(relative);
            } else if depth < MAX_DEPTH {
                folders.push((path, format!("{relative}/"), depth + 1));
            }
        }
        if files.len() + folders.len() > MAX_FILES {
            return Err(unreadable(root, format!("it holds over {MAX_FILES} files; name the folder of the data")));
        }
    }
    files.sort();
    Ok(files)
}

/// The split that a file's name gives, or else the nearest of its folders.
fn split_of(file: &str) -> Option<String> {
    let (folders, name) = file.rsplit_once('/').unwrap_or(("", file));
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    if let Some(shards) = sharded(stem) {
        return Some(shards.to_owned());
    }
    std::iter::once(stem).chain(folders.rsplit('/')).find_map(split_word).map(str::to_owned)
}

/// `NAME` of `NAME-00000-of-00001`, which may go on with a hash.
fn sharded(stem: &str) -> Option<&str> {
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let (left, right) = stem.rsplit_once("-of-")?;
    let (name, index) = left.rsplit_once('-')?;
    let count = right.split('-').next().unwrap_or_default();
    (is_number(index) && is_number(count) && !PLAIN_SHARDS.contains(&name)).then_some(name)
}

fn split_word(text: &str) -> Option<&'static str> {
    let words = text.split(|char: char| !char.is_alphabetic()).map(str::to_lowercase);
    let split_of = |word: String| SPLIT_WORDS.iter().find(|(_, words)| words.contains(&word.as_str()));
    words.filter_map(split_of).map(|(split, _)| *split).next()
}

/// One of `there`: what is wanted, or else the preferred one, or the only one.
pub(super) fn choose(
    path: &Path,
    what: &'static str,
    wanted: Option<&str>,
    preferred: &str,
    there: Vec<String>,
) -> Result<String, DatasetError> {
    let is_there = |name: &str| there.iter().any(|other| other == name);
    match (wanted, &there[..]) {
        (Some(wanted), _) if is_there(wanted) => Ok(wanted.to_owned()),
        (Some(wanted), _) => {
            let hint = hint(wanted, there.iter().map(String::as_str));
            Err(DatasetError::NoSuchPart { path: path.to_owned(), what, wanted: wanted.to_owned(), there, hint })
        }
        (None, _) if is_there(preferred) => Ok(preferred.to_owned()),
        (None, [only]) => Ok(only.clone()),
        (None, _) => Err(DatasetError::SeveralParts { path: path.to_owned(), what, there }),
    }
}

pub(super) fn unreadable(path: &Path, reason: impl ToString) -> DatasetError {
    DatasetError::Unreadable { path: path.to_owned(), reason: reason.to_string() }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A folder of empty files, or of files with a text.
    pub(in crate::dataset) fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    /// `expect` are the files' names, or what the message has in it.
    #[track_caller]
    pub(in crate::dataset) fn check(
        root: &Path,
        (split, subset): (Option<&str>, Option<&str>),
        expect: Result<&[&str], &str>,
    ) {
        match (data_files(root, Part { split, subset }), expect) {
            (Ok(files), Ok(expect)) => {
                let files: Vec<_> =
                    files.iter().map(|file| file.strip_prefix(root).unwrap().to_str().unwrap()).collect();
                assert_eq!(files, expect);
            }
            (Err(error), Err(expect)) => assert!(error.to_string().contains(expect), "{error}"),
            (outcome, _) => panic!("{outcome:?}, expected {expect:?}"),
        }
    }

    fn check_names(names: &[&str], part: (Option<&str>, Option<&str>), expect: Result<&[&str], &str>) {
        let files: Vec<_> = names.iter().map(|name| (*name, "")).collect();
        check(folder(&files).path(), part, expect);
    }

    #[test]
    fn files_without_a_split_s_name_are_all_of_train() {
        check_names(
            &["b.jsonl", "a.jsonl", "README.md", "dataset_infos.json"],
            (None, None),
            Ok(&["a.jsonl", "b.jsonl"]),
        );
        check_names(&["a.jsonl", "b.parquet"], (None, None), Err("are of different formats"));
        check_names(&["README.md", ".cache/x.jsonl"], (None, None), Err("holds no .jsonl, .json, .csv"));
        check_names(&["a.jsonl"], (Some("test"), None), Err("has no split \"test\"; it has [\"train\"]"));
    }

    #[test]
    fn names_of_files_and_folders_tell_splits() {
        let hub = [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
        ];
        check_names(&hub, (None, None), Ok(&hub[..2]));
        check_names(&hub, (Some("test"), None), Ok(&hub[2..]));
        check_names(&hub, (Some("tset"), None), Err("did you mean \"test\"?"));
        check_names(&["train/a.csv", "train/b.csv", "dev/a.csv"], (Some("validation"), None), Ok(&["dev/a.csv"]));
        check_names(&["my_train_v2.jsonl", "my_eval.jsonl", "notes.jsonl"], (None, None), Ok(&["my_train_v2.jsonl"]));
        check_names(&["train.json", "config.json"], (None, None), Ok(&["train.json"]));
        // Nothing is guessed where there are several and none is train.
        let suites = ["aime-00000-of-00001.parquet", "amc-00000-of-00001-0123abcd.parquet"];
        check_names(&suites, (None, None), Err("has several splits, [\"aime\", \"amc\"]: set split to one"));
        check_names(&suites[..1], (None, None), Ok(&suites[..1]));
        let shards = ["data-00000-of-00001.jsonl", "part-00000-of-00001.jsonl"];
        check_names(&shards, (None, None), Ok(&shards));
    }

    #[test]
    fn subsets_are_folders() {
        let names = ["main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"];
        check_names(&names, (None, Some("main")), Ok(&names[..1]));
        check_names(
            &names,
            (None, Some("socrates")),
            Err("has no subset \"socrates\"; it has [\"main\", \"socratic\"]; did"),
        );
        let folder = folder(&[("a.jsonl", "")]);
        let file = folder.path().join("a.jsonl");
        check(&file, (Some("train"), None), Err("a file has no split or subset to choose"));
    }
}
