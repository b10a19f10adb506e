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

    fn unpack(frame: &[u8]) -> Result<Vec<u8>, DriverError> {
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

#[cfg(test)]
mod tests {
    use super::super::driver::usable_gpus;
    use super::*;

    static CACHE: Image = image!("cache");

    #[test]
    fn cubins_are_for_their_gpus_and_whole() {
        for (major, frame) in CACHE.cubins {
            let cubin = Image::unpack(frame).unwrap();
            // An ELF file, whose flags begin with the architecture: 80 or 90.
            assert_eq!(&cubin[..4], b"\x7fELF");
            assert_eq!(i32::from(cubin[48]), 10 * major);
        }
    }

    #[test]
    fn broken_frames_are_errors() {
        let (_, frame) = CACHE.cubins[1];
        for cut in [0, 3, 20, frame.len() / 2, frame.len() - 1] {
            assert!(Image::unpack(&frame[..cut]).is_err(), "{cut} bytes of {}", frame.len());
        }
        // The last bytes are the checksum.
        for at in [frame.len() / 2, frame.len() - 1] {
            let mut frame = frame.to_vec();
            frame[at] ^= 1;
            assert!(Image::unpack(&frame).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_broken_cubin_gives_way_to_the_ptx() {
        if let Err(reason) = usable_gpus() {
            return println!("skipped: {reason}");
        }
        let gpu = Gpu::shared(0).unwrap();
        let image = Image { cubins: CACHE.cubins.map(|(major, _)| (major, &b"nothing"[..])), ..CACHE };
        assert!(image.load(&gpu).unwrap().function("append").is_ok());
    }
}
