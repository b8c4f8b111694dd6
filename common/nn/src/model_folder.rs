//! Weights in Hugging Face folders: one or several safetensors files, read and written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use aha_core::manifest::{Manifest, ParamSpec};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::comm::CommError;
use crate::model_config::ModelConfig;
use crate::tensor_data;
use crate::unit::{ModelWeights, Unit, Walk};
use crate::weights::Weights;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

#[derive(Debug, thiserror::Error)]
pub enum ModelFolderError {
    #[error("no weights in {folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there", folder = folder.display())]
    NoWeights { folder: PathBuf },
    #[error("cannot read {path}: {reason}", path = path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{path}: tensor {name:?} {problem}", path = path.display())]
    BadTensor { path: PathBuf, name: String, problem: String },
    #[error("cannot write {path}: {reason}", path = path.display())]
    Unwritable { path: PathBuf, reason: String },
    #[error(transparent)]
    Comm(#[from] CommError),
}

/// Checks that a model folder has all weights, without reading them.
///
/// # Errors
/// As for [`load_weights`].
pub fn check_weights(folder: &Path, config: &ModelConfig) -> Result<(), ModelFolderError> {
    visit_units(folder, &config.manifest(), |_, _| Ok(()))
}

/// Reads the weights of a model folder, converted to `kind` on `device`.
///
/// # Errors
/// Names the file or tensor that is missing, truncated, or of another shape or type than `config` says.
pub fn load_weights(
    folder: &Path,
    config: &ModelConfig,
    world_size: usize,
    kind: Kind,
    device: Device,
) -> Result<Weights, ModelFolderError> {
    // Memory is taken for what is there, not for what config.json says.
    check_weights(folder, config)?;
    let weights = Weights::zeros(config.manifest(), world_size, kind, device);
    visit_units(folder, &weights.manifest, |unit_idx, stored| {
        for (mut target, stored) in weights.views(unit_idx).into_iter().zip(stored) {
            let source = stored.to_tensor()?;
            tch::no_grad(|| target.copy_(&source));
        }
        Ok(())
    })?;
    Ok(weights)
}

/// Reads the weights of a model folder unit by unit: calls `take` with the index of each and its parameters as they are
/// stored, on the CPU, in the order of the manifest.
///
/// # Errors
/// As for [`load_weights`].
pub fn load_units(
    folder: &Path,
    config: &ModelConfig,
    mut take: impl FnMut(usize, Vec<Tensor>),
) -> Result<(), ModelFolderError> {
    visit_units(folder, &config.manifest(), |unit_idx, stored| {
        take(unit_idx, stored.iter().map(StoredTensor::to_tensor).collect::<Result<_, _>>()?);
        Ok(())
    })
}

/// Writes `model.safetensors` and `config.json`, one unit at a time; the caller adds the tokenizer's files.
///
/// Where ranks share the weights, the other ranks take part by [`Walk::all`], which they finish; whatever happens to the
/// files, this rank does so too.
///
/// # Errors
/// If a file cannot be written whole, or ranks that share the weights cannot reach each other.
pub fn save_weights(folder: &Path, config: &ModelConfig, weights: &dyn ModelWeights) -> Result<(), ModelFolderError> {
    save_weights_as(weights.kind(), folder, config, weights)
}

/// As [`save_weights`], converted to `kind`: fp32 or bf16.
///
/// # Errors
/// As [`save_weights`].
pub fn save_weights_as(
    kind: Kind,
    folder: &Path,
    config: &ModelConfig,
    weights: &dyn ModelWeights,
) -> Result<(), ModelFolderError> {
    save_tensors(&folder.join(SINGLE_FILE), kind, weights, &[])?;
    let path = folder.join("config.json");
    let dtype = if kind == Kind::BFloat16 { "bfloat16" } else { "float32" };
    let text = format!("{:#}\n", config.to_json(dtype));
    std::fs::write(&path, text).map_err(|error| ModelFolderError::Unwritable { path, reason: error.to_string() })
}

/// Writes all parameters, converted to `kind`, to one file, one unit at a time, with `metadata` in its head.
pub(crate) fn save_tensors(
    path: &Path,
    kind: Kind,
    weights: &dyn ModelWeights,
    metadata: &[(&str, &str)],
) -> Result<(), ModelFolderError> {
    let mut walk = Walk::all(weights);
    let mut file = create_tensor_file(path, kind, weights.manifest(), metadata);
    for _ in &weights.manifest().units {
        let unit = walk.next(weights)?;
        file = file.and_then(|mut file| write_unit(&mut file, &unit, kind).map(|()| file));
    }
    file.and_then(|mut file| file.flush())
        .map_err(|error| ModelFolderError::Unwritable { path: path.to_owned(), reason: error.to_string() })
}

/// Begins a safetensors file: the length of its head, and the head, which says where the tensors will be. They follow in
/// the order of the manifest.
fn create_tensor_file(
    path: &Path,
    kind: Kind,
    manifest: &Manifest,
    metadata: &[(&str, &str)],
) -> io::Result<BufWriter<File>> {
    let dtype = if kind == Kind::BFloat16 { "BF16" } else { "F32" };
    let mut head = serde_json::Map::new();
    // transformers and PEFT look for the format.
    let metadata: BTreeMap<_, _> = [("format", "pt")].iter().chain(metadata).copied().collect();
    head.insert("__metadata__".to_owned(), json!(metadata));
    let mut end = 0;
    for param in manifest.params() {
        let start = end;
        end += param.numel() * kind.elt_size_in_bytes();
        let entry = json!({"dtype": dtype, "shape": param.shape, "data_offsets": [start, end]});
        head.insert(param.name.clone(), entry);
    }
    let mut head = serde_json::to_vec(&head)?;
    // The tensors begin at a multiple of 8.
    head.resize(head.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&(head.len() as u64).to_le_bytes())?;
    file.write_all(&head)?;
    Ok(file)
}

fn write_unit(file: &mut impl Write, unit: &Unit, kind: Kind) -> io::Result<()> {
    for param in unit.params() {
        let param = param.detach().to_kind(kind).to_device(Device::Cpu).contiguous();
        file.write_all(tensor_data::bytes(&param))?;
    }
    Ok(())
}

/// Where each tensor of a folder is.
fn tensor_files(folder: &Path) -> Result<BTreeMap<String, PathBuf>, ModelFolderError> {
    let single = folder.join(SINGLE_FILE);
    if single.is_file() {
        let file = map(&single)?;
        let tensors = SafeTensors::deserialize(&file).map_err(|error| unreadable(&single, error))?;
        return Ok(tensors.names().into_iter().map(|name| (name.to_owned(), single.clone())).collect());
    }
    let path = folder.join(INDEX_FILE);
    if !path.is_file() {
        return Err(ModelFolderError::NoWeights { folder: folder.to_owned() });
    }
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(&path).map_err(|error| unreadable(&path, error))?;
    let index: Index = serde_json::from_str(&text).map_err(|error| unreadable(&path, error))?;
    index
        .weight_map
        .into_iter()
        .map(|(name, file)| {
            if Path::new(&file).components().count() == 1 && !file.starts_with('.') {
                Ok((name, folder.join(file)))
            } else {
                Err(unreadable(&path, format!("it places {name:?} in {file:?}, outside the folder")))
            }
        })
        .collect()
}

pub(crate) fn map(path: &Path) -> Result<Mmap, ModelFolderError> {
    let file = File::open(path).map_err(|error| unreadable(path, error))?;
    // SAFETY: the map is read once, here in this module, and dropped; a file that another process truncates
    // meanwhile would fault, which is how every reader of mapped weights behaves.
    unsafe { Mmap::map(&file) }.map_err(|error| unreadable(path, error))
}

pub(crate) fn unreadable(path: &Path, reason: impl ToString) -> ModelFolderError {
    ModelFolderError::Unreadable { path: path.to_owned(), reason: reason.to_string() }
}

/// A tensor of a file, of the shape and of a type that it must have.
pub(crate) struct StoredTensor<'a> {
    path: &'a Path,
    name: &'a str,
    view: TensorView<'a>,
    kind: Kind,
}

impl<'a> StoredTensor<'a> {
    pub(crate) fn new(path: &'a Path, spec: &'a ParamSpec, view: TensorView<'a>) -> Result<Self, ModelFolderError> {
        let shape = &spec.shape;
        if view.shape() != shape {
            let problem = format!("has shape {:?}, but config.json makes it {shape:?}", view.shape());
            return Err(bad_tensor(path, &spec.name, problem));
        }
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            other => {
                let problem = format!("has type {other:?}; supported are F32, F16 and BF16");
                return Err(bad_tensor(path, &spec.name, problem));
            }
        };
        Ok(Self { path, name: &spec.name, view, kind })
    }

    pub(crate) fn to_tensor(&self) -> Result<Tensor, ModelFolderError> {
        let sizes: Vec<i64> = self.view.shape().iter().map(|&size| size as i64).collect();
        Tensor::f_from_data_size(self.view.data(), &sizes, self.kind)
            .map_err(|error| bad_tensor(self.path, self.name, error.to_string()))
    }
}

/// Calls `visit` with the index of every unit and its tensors, in the order of the manifest.
fn visit_units(
    folder: &Path,
    manifest: &Manifest,
    mut visit: impl FnMut(usize, &[StoredTensor<'_>]) -> Result<(), ModelFolderError>,
) -> Result<(), ModelFolderError> {
    let files = tensor_files(folder)?;
    let mut open: BTreeMap<&Path, Mmap> = BTreeMap::new();
    for path in files.values() {
        if !open.contains_key(path.as_path()) {
            open.insert(path, map(path)?);
        }
    }
    let mut parsed = BTreeMap::new();
    for (path, file) in &open {
        parsed.insert(*path, SafeTensors::deserialize(file).map_err(|error| unreadable(path, error))?);
    }
    for (unit_idx, unit) in manifest.units.iter().enumerate() {
        let mut stored = Vec::new();
        for spec in &unit.params {
            let path = files.get(&spec.name);
            let path = path.ok_or_else(|| bad_tensor(folder, &spec.name, "is missing".to_owned()))?;
            let view = parsed[path.as_path()].tensor(&spec.name);
            let view = view.map_err(|error| bad_tensor(path, &spec.name, error.to_string()))?;
            stored.push(StoredTensor::new(path, spec, view)?);
        }
        visit(unit_idx, &stored)?;
    }
    Ok(())
}

pub(crate) fn bad_tensor(path: &Path, name: &str, problem: String) -> ModelFolderError {
    ModelFolderError::BadTensor { path: path.to_owned(), name: name.to_owned(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        let raw = serde_json::json!({"model_type": "qwen3", "vocab_size": 19, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "tie_word_embeddings": false});
        ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
    }

    fn saved(kind: Kind) -> (tempfile::TempDir, Weights) {
        let folder = tempfile::tempdir().unwrap();
        let weights = Weights::random(&config(), 3, 2, kind, Device::Cpu);
        save_weights(folder.path(), &config(), &weights).unwrap();
        (folder, weights)
    }

    fn load(folder: &Path, config: &ModelConfig) -> Result<Weights, ModelFolderError> {
        load_weights(folder, config, 1, Kind::Float, Device::Cpu)
    }

    #[track_caller]
    fn check_error(folder: &Path, config: &ModelConfig, expect: &[&str]) {
        let error = load(folder, config).unwrap_err().to_string();
        for expect in expect {
            assert!(error.contains(expect), "no {expect:?} in: {error}");
        }
    }

    #[test]
    fn what_is_written_reads_back_equal() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let (folder, weights) = saved(kind);
            assert_eq!(ModelConfig::load(folder.path()).unwrap().manifest(), config().manifest());
            let read = load(folder.path(), &config()).unwrap();
            for unit_idx in 0..weights.num_units() {
                for (read, written) in read.views(unit_idx).iter().zip(weights.views(unit_idx)) {
                    assert!(read.equal(&written.to_kind(Kind::Float)));
                }
            }
        }
    }

    #[test]
    fn broken_folders_are_refused_by_file_and_tensor() {
        let empty = tempfile::tempdir().unwrap();
        check_error(empty.path(), &config(), &["no weights", "model.safetensors"]);

        let (folder, _) = saved(Kind::Float);
        let mut wider = config();
        wider.intermediate_size = 32;
        check_error(folder.path(), &wider, &["mlp.gate_proj.weight", "[24, 16]", "[32, 16]"]);
        let mut deeper = config();
        deeper.num_layers = 2;
        check_error(folder.path(), &deeper, &["model.layers.1.", "missing"]);
        let mut endless = config();
        (endless.intermediate_size, endless.hidden_size) = (1 << 22, 1 << 22);
        check_error(folder.path(), &endless, &["model.embed_tokens.weight", "[19, 16]", "[19, 4194304]"]);

        let path = folder.path().join(SINGLE_FILE);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 100]).unwrap();
        check_error(folder.path(), &config(), &["model.safetensors"]);
        std::fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        check_error(folder.path(), &config(), &["model.safetensors"]);
    }

    #[test]
    fn several_files_are_read_by_their_index() {
        let (folder, weights) = saved(Kind::Float);
        std::fs::rename(folder.path().join(SINGLE_FILE), folder.path().join("model-00001-of-00001.safetensors"))
            .unwrap();
        let index = |file: &str| {
            let map: BTreeMap<_, _> =
                weights.manifest.params().map(|param| (param.name.clone(), file.to_owned())).collect();
            std::fs::write(folder.path().join(INDEX_FILE), serde_json::json!({"weight_map": map}).to_string()).unwrap();
        };
        index("model-00001-of-00001.safetensors");
        assert!(load(folder.path(), &config()).unwrap().embedding().equal(&weights.embedding()));
        index("../model-00001-of-00001.safetensors");
        check_error(folder.path(), &config(), &["outside the folder"]);
        index("absent.safetensors");
        check_error(folder.path(), &config(), &["absent.safetensors"]);
    }
}
