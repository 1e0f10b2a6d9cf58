//! Where the finished blocks of a text are: in memory, or in tiers of memory and disk, perhaps below a pool on the device that computes.

use candle_core::{DType, Device, Tensor};
use landmark_attention::retrieval::{self, Blocks, Kept, Retrieved, Selection, SlotQueries};

use crate::paged::Paged;
use crate::pooled::Pooled;
use crate::ring::Ring;
use crate::{CacheConfig, Result};

/// The finished blocks of all layers, oldest first.
#[derive(Debug)]
pub enum BlockStore {
    /// Keys, values and landmark keys of each layer, on the device that computes.
    Rings(Vec<Ring<3>>),
    /// In tiers.
    Paged(Box<Paged>),
    /// In tiers below a pool on the device that computes.
    Pooled(Box<Pooled>),
}

impl BlockStore {
    /// An empty store in memory.
    pub fn in_memory(config: &CacheConfig, head_dim: usize, dtype: DType, device: &Device) -> Result<Self> {
        let place = [config.mem_freq + 1, head_dim];
        let rows: [&[usize]; 3] = [&place, &place, &[head_dim]];
        let ring = |_| Ring::new([config.batch, config.kv_heads], rows, config.max_blocks, dtype, device);
        Ok(Self::Rings((0..config.layers).map(ring).collect::<Result<_>>()?))
    }

    /// Blocks held.
    pub fn len(&self) -> usize {
        match self {
            Self::Rings(layers) => layers[0].len(),
            Self::Paged(paged) => paged.len(),
            Self::Pooled(pooled) => pooled.paged().len(),
        }
    }

    /// What writes blocks to disk, if they are in tiers.
    pub fn paged(&mut self) -> Option<&mut Paged> {
        match self {
            Self::Rings(_) => None,
            Self::Paged(paged) => Some(paged),
            Self::Pooled(pooled) => Some(pooled.paged_mut()),
        }
    }

    /// The number in the text of the `i`-th block that is held, of `finished` that the text has.
    pub fn number(&self, i: usize, finished: usize) -> usize {
        match self {
            Self::Rings(layers) => finished - layers[0].len() + i,
            Self::Paged(paged) => paged.number(i),
            Self::Pooled(pooled) => pooled.paged().number(i),
        }
    }

    /// Bytes of memory set aside.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Rings(layers) => layers.iter().map(Ring::bytes).sum(),
            Self::Paged(paged) => paged.bytes(),
            Self::Pooled(pooled) => pooled.bytes(),
        }
    }

    /// Those of them that are in a pool on a device.
    pub fn pool_bytes(&self) -> usize {
        match self {
            Self::Rings(_) | Self::Paged(_) => 0,
            Self::Pooled(pooled) => pooled.device_bytes(),
        }
    }

    /// Bytes of memory that so many blocks take.
    pub fn bytes_of(&self, blocks: usize) -> usize {
        match self {
            Self::Rings(layers) => layers.iter().map(|ring| ring.bytes_of(blocks)).sum(),
            Self::Paged(paged) => paged.bytes_of(blocks),
            Self::Pooled(pooled) => pooled.bytes_of(blocks),
        }
    }

    /// Makes room for `blocks`, at most the limit.
    pub fn reserve(&mut self, blocks: usize) -> Result<()> {
        match self {
            Self::Rings(layers) => layers.iter_mut().try_for_each(|ring| ring.reserve(blocks)),
            Self::Paged(paged) => paged.reserve(blocks),
            Self::Pooled(pooled) => pooled.reserve(blocks),
        }
    }

    /// Whether all blocks are in memory, as they are read.
    pub fn is_in_memory(&self) -> bool {
        matches!(self, Self::Rings(_))
    }

    /// Forgets all but the first `blocks` of a store in memory that drops none.
    pub fn truncate(&mut self, blocks: usize) {
        match self {
            Self::Rings(layers) => layers.iter_mut().for_each(|ring| ring.truncate(blocks)),
            Self::Paged(_) | Self::Pooled(_) => unreachable!("only what is in memory is cut"),
        }
    }

    /// Forgets all blocks; keeps the memory.
    pub fn clear(&mut self) {
        match self {
            Self::Rings(layers) => layers.iter_mut().for_each(Ring::clear),
            Self::Paged(paged) => paged.clear(),
            Self::Pooled(pooled) => pooled.clear(),
        }
    }

    /// Appends blocks: of each layer keys and values `[batch, kv_heads, n, block, head_dim]`, of each block its first token and the number of its
    /// tokens.
    pub fn append(&mut self, layers: &[(Tensor, Tensor)], sizes: &[(usize, u32)]) -> Result<()> {
        match self {
            Self::Rings(rings) => rings.iter_mut().zip(layers).try_for_each(|(ring, (keys, values))| {
                let landmarks = keys.narrow(3, keys.dims()[3] - 1, 1)?.squeeze(3)?;
                ring.append([keys, values, &landmarks])
            }),
            Self::Paged(paged) => paged.append(layers, sizes),
            Self::Pooled(pooled) => pooled.append(layers, sizes),
        }
    }

    /// Reads the best blocks of a layer: what was read, and which, as [`retrieval::select`] says it.
    pub fn retrieve(
        &mut self,
        layer: usize,
        queries: SlotQueries,
        lengths: Option<&[u32]>,
        top_k: usize,
        selection: Selection,
    ) -> Result<(Retrieved, Tensor)> {
        match self {
            Self::Rings(layers) => {
                let [keys, values, landmarks] = layers[layer].tensors();
                let (first, len) = (layers[layer].first(), layers[layer].len());
                let kept = Kept::Ring { keys, values };
                let blocks = Blocks { kept, landmarks: Some(landmarks), first, len, lengths };
                let chosen = retrieval::select(queries, blocks, top_k, selection)?;
                Ok((retrieval::attend(queries, blocks, &chosen)?, chosen))
            }
            Self::Paged(paged) => {
                let chosen = paged.select(layer, queries, lengths, top_k, selection)?;
                paged.promote(layer, &chosen)?;
                let attend = |blocks: Blocks| retrieval::attend(queries, blocks, &chosen);
                Ok((paged.with_blocks(layer, lengths, attend)?, chosen))
            }
            Self::Pooled(pooled) => pooled.retrieve(layer, queries, lengths, top_k, selection),
        }
    }
}
