//! What the crate carries of a module of kernels, and which of it a GPU gets.

use std::io::Read;
use std::sync::Arc;

use ruzstd::decoding::StreamingDecoder;

use super::driver::{DriverError, Gpu, Module};

/// A module of kernels, made by `kernels/build.py`: as PTX, which the driver compiles for any GPU in seconds, and compiled already for
/// those that most servers have.
pub(super) struct Image {
    pub(super) ptx: &'static str,
    /// By the major number of the compute capability that each is for, and any minor one. In frames of zstd.
    pub(super) cubins: [(i32, &'static [u8]); 2],
}

/// The image of the source of this name.
macro_rules! image {
    ($name:literal) => {
        Image {
            ptx: include_str!(concat!("kernels/", $name, ".ptx")),
            cubins: [
                (8, include_bytes!(concat!("kernels/sm_80/", $name, ".cubin.zst"))),
                (9, include_bytes!(concat!("kernels/sm_90/", $name, ".cubin.zst"))),
            ],
        }
    };
}
pub(super) use image;

impl Image {
    /// Loads what fits the GPU. A cubin that is broken, or that the driver refuses, gives way to the PTX, and a warning says so.
    ///
    /// # Errors
    /// The PTX is refused too.
    pub(super) fn load(&self, gpu: &Arc<Gpu>) -> Result<Module, DriverError> {
        let (major, _) = gpu.capability()?;
        if let Some((_, cubin)) = self.cubins.iter().find(|(of, _)| *of == major) {
            // SAFETY: what `build.py` has packed: the frame's checksum says that all of it is there (11).
            let load = |cubin: Vec<u8>| unsafe { Module::load_cubin(gpu, &cubin) };
            match Self::unpack(cubin).and_then(load) {
                Ok(module) => return Ok(module),
                Err(error) => tracing::warn!(
                    target: "kv_cache::cuda", %error,
                    "compiled kernels cannot be loaded: the driver compiles them now, which takes seconds",
                ),
            }
        }
        Module::load_ptx(gpu, self.ptx)
    }

    /// A cubin out of its frame.
    pub(super) fn unpack(frame: &[u8]) -> Result<Vec<u8>, DriverError> {
        let broken = |text: String| DriverError::Call {
            call: "unpacking kernels",
            name: "the frame is broken".into(),
            text,
        };
        let mut cubin = Vec::new();
        let mut decoder = StreamingDecoder::new(frame).map_err(|error| broken(error.to_string()))?;
        decoder.read_to_end(&mut cubin).map_err(|error| broken(error.to_string()))?;
        let [found, wanted] =
            [decoder.decoder.get_calculated_checksum(), decoder.decoder.get_checksum_from_data()];
        if wanted.is_none() || found != wanted {
            return Err(broken(format!("its checksum is {found:08x?}, not {wanted:08x?}")));
        }
        Ok(cubin)
    }
}
