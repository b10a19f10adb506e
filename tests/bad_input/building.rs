//! Settings that make no cache.

use kv_cache::half::f16;
use kv_cache::*;

use crate::common::{Tokens, geometry};

fn base() -> CacheConfig {
    let mut config = CacheConfig::new(geometry((5, 2, 2, 8, 6), ElementType::F16));
    config.memory_bytes_per_device = 1 << 20;
    config.devices = Devices::cpu(1);
    config
}

async fn refused(config: CacheConfig) -> ConfigError {
    let told = config.validate().unwrap_err();
    match Cache::from_config(config).build().await {
        Err(BuildError::Config(error)) => assert_eq!(error, told),
        other => panic!("{other:?}"),
    }
    told
}

#[tokio::test]
async fn every_field_out_of_range() {
    assert_eq!(base().validate(), Ok(()));
    type Change = fn(&mut CacheConfig);
    let wrong: [(&str, &str, Change); 41] = [
        ("devices", "cpu = 0", |c| c.devices = Devices::cpu(0)),
        ("devices", "cuda = 0", |c| c.devices = Devices::cuda(0)),
        ("pinned_memory_bytes", "1", |c| (c.devices, c.pinned_memory_bytes) = (Devices::Auto, 1)),
        ("host_tier_bytes_per_device", "1", |c| c.host_tier_bytes_per_device = 1),
        ("memory_bytes_per_device", "0", |c| c.memory_bytes_per_device = 0),
        ("memory_bytes_per_device", "1000", |c| c.memory_bytes_per_device = 1000),
        ("max_tokens", "0", |c| c.max_tokens = 0),
        ("max_total_tokens", "0", |c| c.max_total_tokens = 0),
        ("max_sequences", "0", |c| c.max_sequences = 0),
        ("max_sequences", "1048577", |c| c.max_sequences = (1 << 20) + 1),
        ("max_jobs_in_flight", "0", |c| c.max_jobs_in_flight = 0),
        ("max_jobs_in_flight", "18446744073709551615", |c| c.max_jobs_in_flight = usize::MAX),
        ("max_bytes_in_flight", "0", |c| c.max_bytes_in_flight = 0),
        ("compression.ratio", "0", |c| c.compression = keep(0.0)),
        ("compression.ratio", "-1", |c| c.compression = keep(-1.0)),
        ("compression.ratio", "1.5", |c| c.compression = keep(1.5)),
        ("compression.ratio", "NaN", |c| c.compression = keep(f32::NAN)),
        ("geometry.groups", "0 groups", |c| c.geometry.groups.clear()),
        ("geometry.groups[0].layers", "0", |c| c.geometry.groups[0].layers = 0),
        ("geometry.groups[0].layers", "1025", |c| c.geometry.groups[0].layers = 1025),
        ("geometry.groups[0].kv_heads", "0", |c| c.geometry.groups[0].kv_heads = 0),
        ("geometry.groups[0].key_dim", "0", |c| c.geometry.groups[0].key_dim = 0),
        ("geometry.groups[0].value_dim", "4294967295", |c| c.geometry.groups[0].value_dim = u32::MAX),
        ("geometry.block_tokens", "0", |c| c.geometry.block_tokens = 0),
        ("geometry.block_tokens", "4294967295", |c| c.geometry.block_tokens = u32::MAX),
        ("geometry.block_tokens", "40", |c| {
            (c.quantisation.format, c.geometry.block_tokens) = (Some(Format::Int4), 40)
        }),
        // Keys would take fewer bytes, values as many as before.
        ("quantisation.colder_formats", "fp8", |c| c.quantisation.colder_formats = vec![Format::Fp8]),
        ("quantisation.colder_formats", "fp8", |c| {
            (c.quantisation.format, c.quantisation.colder_formats) = (Some(Format::Int8), vec![Format::Fp8])
        }),
        ("quantisation.colder_formats", "r4", |c| {
            // Nothing is sealed in anything but raw.
            c.quantisation.values_format = Some(Format::Raw);
            c.quantisation.colder_formats = vec![Format::R4]
        }),
        ("quantisation.colder_formats", "r4", |c| {
            c.quantisation.values_format = Some(Format::R2);
            c.quantisation.colder_formats = vec![Format::R4]
        }),
        ("quantisation.colder_formats", "r2, r3", |c| {
            c.quantisation.colder_formats = vec![Format::R2, Format::R3]
        }),
        ("quantisation.colder_formats", "r4, r3, r2", |c| {
            c.quantisation.colder_formats = vec![Format::R4, Format::R3, Format::R2]
        }),
        ("quantisation.colder_formats", "r4", |c| {
            (c.quantisation.format, c.quantisation.colder_formats) = (Some(Format::Raw), vec![Format::R4])
        }),
        // Turned off is no reason to say nonsense.
        ("quantisation.colder_formats", "r2, r3", |c| {
            c.quantisation.enabled = false;
            c.quantisation.colder_formats = vec![Format::R2, Format::R3]
        }),
        ("quantisation.colder_formats", "r4", |c| {
            c.quantisation.enabled = false;
            (c.quantisation.format, c.quantisation.colder_formats) = (Some(Format::Raw), vec![Format::R4])
        }),
        ("geometry.block_tokens", "40", |c| {
            c.quantisation.enabled = false;
            (c.quantisation.colder_formats, c.geometry.block_tokens) = (vec![Format::Int4], 40)
        }),
        ("quantisation.raw_first_layers, raw_last_layers", "2 and 65535 of 2 layers", |c| {
            (c.quantisation.raw_first_layers, c.quantisation.raw_last_layers) = (2, u16::MAX)
        }),
        ("geometry", "a block over 1 GiB", |c| c.geometry = huge()),
        ("geometry.groups[0].rope.rotary_dims", "10", |c| c.geometry.groups[0].rope = rope(10, 5)),
        ("geometry.groups[0].rope.rotary_dims", "3", |c| c.geometry.groups[0].rope = rope(3, 1)),
        ("geometry.groups[0].rope.inv_freq", "3", |c| c.geometry.groups[0].rope = rope(8, 3)),
    ];
    for (field, value, change) in wrong {
        let mut config = base();
        change(&mut config);
        match refused(config).await {
            ConfigError::Invalid { field: told, value: told_value, fix } => {
                assert_eq!((told, told_value.as_str()), (field, value));
                assert!(!fix.is_empty());
            }
            other => panic!("{field}: {other}"),
        }
    }
    let mut config = base();
    config.geometry.groups[0].rope = rope(8, 4);
    config.compression = keep(1.0);
    assert_eq!(config.validate(), Ok(()));
    config.quantisation.enabled = false;
    config.quantisation.colder_formats = vec![Format::R4, Format::R2];
    assert_eq!(config.validate(), Ok(()), "formats that would do are no error while they are turned off");
}

fn keep(ratio: f32) -> Compression {
    Compression { enabled: true, ratio, method: CompressionMethod::Truncation }
}

fn huge() -> Geometry {
    Geometry::new(1024, 1024, 4096, ElementType::F32).block_tokens(1024)
}

fn rope(rotary_dims: u32, frequencies: usize) -> Option<Rope> {
    let inv_freq = vec![1.0; frequencies];
    Some(Rope { inv_freq, rotary_dims, layout: RopeLayout::HalfSplit, attention_scale: 1.0 })
}

/// The fix says how many bytes are missing, and with so many more it works.
#[tokio::test]
async fn a_budget_that_is_just_enough() {
    for quantised in [false, true] {
        let mut config = base();
        config.quantisation.enabled = quantised;
        let missing = async |config: &CacheConfig| {
            let ConfigError::Invalid { fix, .. } = refused(config.clone()).await else { panic!() };
            fix.split(' ').next().unwrap().parse::<u64>().unwrap_or_else(|_| panic!("{fix}"))
        };
        config.memory_bytes_per_device = 1;
        config.memory_bytes_per_device = missing(&config).await;
        assert_eq!(missing(&config).await, 1);
        config.memory_bytes_per_device += 1;
        let cache = Cache::from_config(config).build().await.unwrap();
        let layout = cache.config().geometry.layout().unwrap();
        assert!(cache.config().memory_bytes_per_device >= layout.raw_bytes() as u64);
        let sequence = cache.open("tenant", OpenOptions::default()).await.unwrap();
        let new = Tokens::<f16>::generate(layout, 1, 1);
        for committed in 1.. {
            match sequence.append(&new.ids, &new.keys, &new.values).await {
                Ok(now) => assert_eq!(now, committed),
                Err(error) => {
                    assert_eq!(error, Error::Capacity { needed: 1, free: 0, evictable: 0 });
                    assert!(committed > 5 && committed % 5 == 1, "{committed}");
                    break;
                }
            }
        }
    }
}

#[tokio::test]
async fn settings_of_features_that_are_not_built() {
    type Change = fn(&mut CacheConfig);
    let not_built: [(&str, &str, Change); 1] =
        [("geometry.groups", "2 groups", |c| c.geometry.groups.extend(c.geometry.groups.clone()))];
    for (field, value, change) in not_built {
        let mut config = base();
        change(&mut config);
        match refused(config).await {
            ConfigError::NotBuilt { field: told, value: told_value, instead } => {
                assert_eq!((told, told_value.as_str()), (field, value));
                assert!(!instead.is_empty());
            }
            other => panic!("{field}: {other}"),
        }
    }
    // What is switched off need not be built.
    let mut config = base();
    (config.quantisation.enabled, config.quantisation.format) = (false, Some(Format::R2));
    assert_eq!(config.sealed_format(), Format::Raw);
    config.compression = Compression { enabled: false, ratio: 9.0, method: CompressionMethod::KeyNorm };
    assert_eq!(config.validate(), Ok(()));
    // Every way of dropping tokens goes with mean keys.
    for method in [CompressionMethod::Truncation, CompressionMethod::KeyNorm, CompressionMethod::KeyDiff] {
        let mut config = base();
        config.compression = Compression { enabled: true, ratio: 0.5, method };
        config.quantisation.key_means = Some("means.json".into());
        assert_eq!(config.validate(), Ok(()), "{method:?}");
    }
}

#[tokio::test]
async fn more_memory_than_there_is() {
    for devices in [1, 3] {
        // Real blocks, 4 MiB each, so that the budget can be used up to the last.
        let geometry = Geometry::new(32, 8, 128, ElementType::F16);
        let builder = Cache::builder(geometry).devices(Devices::cpu(devices));
        match builder.memory_bytes_per_device(1 << 46).build().await {
            Err(BuildError::Memory { requested_bytes, available_bytes, missing_bytes }) => {
                let all = u64::from(devices) << 46;
                assert!(requested_bytes <= all && requested_bytes > all / 100 * 99, "{requested_bytes}");
                assert_eq!(missing_bytes, requested_bytes - available_bytes);
                assert!(available_bytes > 0);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn no_tokio_runtime() {
    let builder = || Cache::from_config(base());
    assert!(matches!(pollster::block_on(builder().build()), Err(BuildError::NoRuntime)));
    assert!(builder().build_blocking().is_ok());
}

const TOML: &str = r#"
    memory_bytes_per_device = 1048576
    devices = { cpu = 1 }
    [geometry]
    block_tokens = 16
    groups = [{ layers = 2, kv_heads = 2, key_dim = 8, value_dim = 6, element = "f16" }]
    [quantisation]
    enabled = true
    [compression]
    enabled = false
"#;

#[test]
fn configuration_files() {
    let config = CacheConfig::from_toml(TOML).unwrap();
    assert_eq!((config.geometry.block_tokens, config.devices), (16, Devices::cpu(1)));
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(CacheConfig::from_json(&json).unwrap(), config);
    // A field that nobody knows, at every depth.
    for (at, with) in [
        ("devices =", "no_such_field = 1\ndevices ="),
        ("block_tokens", "no_such_field = 1\nblock_tokens"),
        ("layers = 2", "no_such_field = 1, layers = 2"),
        ("[quantisation]", "[quantisation]\nno_such_field = 1"),
        ("[compression]", "[compression]\nno_such_field = 1"),
    ] {
        match CacheConfig::from_toml(&TOML.replacen(at, with, 1)) {
            Err(BuildError::Parse(told)) => assert!(told.contains("no_such_field"), "{told}"),
            other => panic!("{other:?}"),
        }
    }
    let mut unknown = json.clone();
    unknown.insert_str(1, "\"no_such_field\":1,");
    match CacheConfig::from_json(&unknown) {
        Err(BuildError::Parse(told)) => {
            assert!(told.contains("no_such_field") && told.contains("line"), "{told}")
        }
        other => panic!("{other:?}"),
    }
    // Text that is none, types that are wrong, fields that are missing.
    for text in ["", "geometry = 1", "memory_bytes_per_device = -1", "devices = \"tpu\"", "\u{0}"] {
        assert!(matches!(CacheConfig::from_toml(text), Err(BuildError::Parse(_))), "{text}");
        assert!(matches!(CacheConfig::from_json(text), Err(BuildError::Parse(_))), "{text}");
    }
    // What can be read is validated.
    let zero = TOML.replacen("devices =", "max_tokens = 0\ndevices =", 1);
    assert!(matches!(CacheConfig::from_toml(&zero), Err(BuildError::Config(ConfigError::Invalid { .. }))));
    let lru = TOML.replacen("devices =", "eviction = \"lru\"\ndevices =", 1);
    assert_eq!(CacheConfig::from_toml(&lru).unwrap().eviction, EvictionPolicy::Lru);
    let mru = TOML.replacen("devices =", "eviction = \"mru\"\ndevices =", 1);
    assert!(matches!(CacheConfig::from_toml(&mru), Err(BuildError::Parse(_))));
    assert!(matches!(CacheConfig::from_file("/no/such/file.toml"), Err(BuildError::Parse(_))));
}

/// A secret never leaves by way of a dumped configuration.
#[test]
fn the_hash_secret_is_not_written_out() {
    let mut config = base();
    config.hash_secret = Some(HashSecret([0xAB; 32]));
    let from_file = format!("hash_secret = {:?}\n{TOML}", [0xABu8; 32]);
    assert_eq!(CacheConfig::from_toml(&from_file).unwrap().hash_secret, config.hash_secret);
    let json = serde_json::to_string(&config).unwrap();
    assert!(!json.contains("171") && !json.contains("hash_secret"), "{json}");
    assert!(!format!("{config:?}").contains("171"), "the secret shows in debug output");
}
