//! Calibration scores: how much each query looks at its best keys, measured on data and kept in a file for masks that prune.
//!
//! The file is a safetensors file, which holds numbers and can hold nothing else. Its tensors are `keys` (L, H, P, C) and `scores`
//! (L, H, P, C), the C candidates of each of P queries in each head of each layer and their mean scores; `importance` (L, H), how
//! many keys a head looks at; and `bound` (L, H), the mean score that a pair outside the file can have at most.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex};

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Error, Result};

/// Largest file that is read.
const MAX_BYTES: u64 = 4 << 30;
/// The one entry of the file's metadata: several would be written in random order, and equal scores in unequal files.
const METADATA: &str = "sparse_mhsa.scores";
/// Files kept in memory between two masks that read them.
const KEPT: usize = 2;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The mean attention weight, softmax over all keys.
    Attention,
    /// The mean magnitude of the scaled score, before softmax.
    Magnitude,
}

/// How the scores came about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// What was measured.
    pub kind: Kind,
    /// Samples that the means are over.
    pub samples: u64,
    /// Prefix tokens that were left out.
    pub num_prefix_tokens: u64,
}

/// Scores of one stack of layers.
#[derive(Debug)]
pub struct Scores {
    /// How they came about.
    pub about: About,
    /// L, H, P, C: layers, heads, patches, candidates per patch.
    pub sizes: [usize; 4],
    /// (L, H, P, C), ascending within a row.
    pub keys: Vec<u32>,
    /// (L, H, P, C)
    pub scores: Vec<f32>,
    /// (L, H)
    pub importance: Vec<f64>,
    /// (L, H)
    pub bound: Vec<f64>,
}

/// Scores by the digest of their file, the latest last.
static READ: Mutex<Vec<(String, Arc<Scores>)>> = Mutex::new(Vec::new());

impl Scores {
    /// Candidates and scores of the `patch`-th query of a head.
    pub fn row(&self, layer: usize, head: usize, patch: usize) -> impl Iterator<Item = (u32, f32)> + '_ {
        let [_, heads, patches, candidates] = self.sizes;
        let start = ((layer * heads + head) * patches + patch) * candidates;
        let row = start..start + candidates;
        self.keys[row.clone()].iter().copied().zip(self.scores[row].iter().copied())
    }

    /// Read a file, and return its digest.
    ///
    /// # Errors
    /// [`Error::Config`] without a key when there is no such file, or it does not hold scores.
    pub fn read(path: &str) -> Result<(String, Arc<Self>)> {
        let bytes = bytes_of(path)?;
        let digest = format!("{:032x}", xxh3_128(&bytes));
        if let Some(known) = recall(&digest) {
            return Ok((digest, known));
        }
        let scores = Arc::new(Self::parse(&bytes).map_err(|message| broken(path, &message))?);
        remember(&digest, &scores);
        Ok((digest, scores))
    }

    /// The scores of a file whose digest must be `digest`.
    ///
    /// # Errors
    /// As [`Self::read`], and when the file is another one by now.
    pub fn read_known(path: &str, digest: &str) -> Result<Arc<Self>> {
        if let Some(known) = recall(digest) {
            return Ok(known);
        }
        let (found, scores) = Self::read(path)?;
        if found == digest {
            return Ok(scores);
        }
        Err(broken(
            path,
            &format!(
                "the file has changed: expected the digest {digest}, got {found}; edges that were chosen once stay fixed"
            ),
        ))
    }

    fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let file =
            SafeTensors::deserialize(bytes).map_err(|error| format!("not a safetensors file: {error}"))?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
        let about = header.metadata().as_ref().and_then(|all| all.get(METADATA));
        let about = about.ok_or("not written by sparse_mhsa.collect_scores: it has no such metadata")?;
        let about: About = serde_json::from_str(about).map_err(|error| format!("metadata: {error}"))?;
        let tensor = |name: &str, dtype: Dtype| match file.tensor(name) {
            Ok(tensor) if tensor.dtype() == dtype => Ok(tensor),
            Ok(tensor) => Err(format!("{name}: expected {dtype:?}, got {:?}", tensor.dtype())),
            Err(error) => Err(format!("{name}: {error}")),
        };
        let keys = tensor("keys", Dtype::U32)?;
        let sizes: [usize; 4] = keys
            .shape()
            .try_into()
            .ok()
            .filter(|sizes: &[usize; 4]| sizes.iter().all(|&size| size > 0) && sizes[3] <= sizes[2])
            .ok_or_else(|| {
                format!("keys: expected (layers, heads, patches, candidates), got {:?}", keys.shape())
            })?;
        let scores = tensor("scores", Dtype::F32)?;
        let of_heads = [tensor("importance", Dtype::F64)?, tensor("bound", Dtype::F64)?];
        for (name, got, expected) in [
            ("scores", scores.shape(), &sizes[..]),
            ("importance", of_heads[0].shape(), &sizes[..2]),
            ("bound", of_heads[1].shape(), &sizes[..2]),
        ] {
            if got != expected {
                return Err(format!("{name}: expected shape {expected:?}, got {got:?}"));
            }
        }
        let [importance, bound] =
            of_heads.map(|tensor| words(tensor.data()).map(f64::from_le_bytes).collect());
        let scores = Scores {
            about,
            sizes,
            keys: words(keys.data()).map(u32::from_le_bytes).collect(),
            scores: words(scores.data()).map(f32::from_le_bytes).collect(),
            importance,
            bound,
        };
        scores.check()?;
        Ok(scores)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let [_, heads, patches, candidates] = self.sizes;
        for (index, row) in self.keys.chunks_exact(candidates).enumerate() {
            if row.windows(2).any(|pair| pair[0] >= pair[1]) || row[candidates - 1] as usize >= patches {
                let (unit, patch) = (index / patches, index % patches);
                return Err(format!(
                    "keys: expected ascending patches below {patches}, got {row:?} for patch {patch} of head {} in layer {}",
                    unit % heads,
                    unit / heads
                ));
            }
        }
        let negative = |x: f64| !(x.is_finite() && x >= 0.0);
        for (name, bad) in [
            ("scores", self.scores.iter().map(|&x| f64::from(x)).find(|&x| negative(x))),
            ("importance", self.importance.iter().copied().find(|&x| negative(x))),
            ("bound", self.bound.iter().copied().find(|&x| negative(x))),
        ] {
            if let Some(bad) = bad {
                return Err(format!("{name}: expected finite numbers of at least 0, got {bad}"));
            }
        }
        Ok(())
    }

    /// Write the file that [`Self::read`] reads; an existing one is replaced whole or not at all.
    ///
    /// # Errors
    /// [`Error::Value`] for scores that could not be read back, or a file that cannot be written.
    pub fn write(&self, path: &str) -> Result<()> {
        let fail = |message: String| Error::Value(format!("{path}: {message}"));
        self.check().map_err(fail)?;
        let keys: Vec<u8> = self.keys.iter().flat_map(|x| x.to_le_bytes()).collect();
        let scores: Vec<u8> = self.scores.iter().flat_map(|x| x.to_le_bytes()).collect();
        let importance: Vec<u8> = self.importance.iter().flat_map(|x| x.to_le_bytes()).collect();
        let bound: Vec<u8> = self.bound.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (whole, heads) = (self.sizes.to_vec(), self.sizes[..2].to_vec());
        let view = |dtype, shape: &[usize], data| {
            TensorView::new(dtype, shape.to_vec(), data).map_err(|error| fail(error.to_string()))
        };
        let tensors = [
            ("keys", view(Dtype::U32, &whole, &keys)?),
            ("scores", view(Dtype::F32, &whole, &scores)?),
            ("importance", view(Dtype::F64, &heads, &importance)?),
            ("bound", view(Dtype::F64, &heads, &bound)?),
        ];
        let about = serde_json::to_string(&self.about).expect("plain data");
        let metadata = HashMap::from([(METADATA.to_owned(), about)]);
        let file = serialize(tensors, Some(metadata)).map_err(|error| fail(error.to_string()))?;
        let part = format!("{path}.part");
        std::fs::write(&part, file)
            .and_then(|()| std::fs::rename(&part, path))
            .map_err(|error| fail(error.to_string()))
    }
}

fn words<const SIZE: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; SIZE]> + '_ {
    bytes.chunks_exact(SIZE).map(|word| word.try_into().expect("a chunk of that size"))
}

fn broken(path: &str, message: &str) -> Error {
    Error::config("", format!("'{path}': {message}"))
}

fn bytes_of(path: &str) -> Result<Vec<u8>> {
    let fail = |error: std::io::Error| broken(path, &error.to_string());
    // Asked by name first: opening a pipe waits for its other end.
    let about = Path::new(path).metadata().map_err(fail)?;
    if !about.is_file() {
        return Err(broken(path, "not a regular file"));
    }
    if about.len() > MAX_BYTES {
        return Err(broken(path, &format!("larger than the {MAX_BYTES} bytes that are read")));
    }
    let mut bytes = Vec::with_capacity(about.len() as usize);
    File::open(path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes)).map_err(fail)?;
    Ok(bytes)
}

// A lock that is busy (or was when the process forked) only costs reading the file again.

fn recall(digest: &str) -> Option<Arc<Scores>> {
    let read = READ.try_lock().ok()?;
    read.iter().find(|(known, _)| known == digest).map(|(_, scores)| Arc::clone(scores))
}

fn remember(digest: &str, scores: &Arc<Scores>) {
    if let Ok(mut read) = READ.try_lock() {
        read.push((digest.to_owned(), Arc::clone(scores)));
        if read.len() > KEPT {
            read.remove(0);
        }
    }
}
