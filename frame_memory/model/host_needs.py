"""What each family of nodes needs of ComfyUI's own code, as data (`host_contract` checks it).

A need is a dotted name and, where it is called, the parameters that the pack passes or overrides. A test derives the
same from the source.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """One thing of the host by its dotted name, and the parameters the pack passes to it or overrides.

    exact: the parameters must be these in this order and no others, since core passes them by position.
    """

    symbol: str
    parameters: tuple[str, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class Family:
    """A file of nodes: the ids it registers and what they need."""

    nodes: tuple[str, ...]
    needs: tuple[Need, ...]


def _needs(table: str) -> tuple[Need, ...]:
    """One need a line: `symbol parameter parameter ...`, with `=` after the symbol for an exact list."""
    found = []
    for line in filter(None, map(str.strip, table.splitlines())):
        symbol, *parameters = line.split()
        exact = parameters[:1] == ["="]
        found.append(Need(symbol, tuple(parameters[1:] if exact else parameters), exact))
    return tuple(found)


API = _needs("""
    comfy_api.latest.io.ComfyNode
    comfy_api.latest.io.Schema node_id display_name category description search_aliases inputs outputs hidden
    comfy_api.latest.io.NodeOutput
    comfy_api.latest.io.Custom
    comfy.cli_args.args.disable_metadata
    comfy_api.latest.io.FolderType.output
    comfy_api.latest.io.Hidden.unique_id
    comfy_api.latest.io.Input
    comfy_api.latest.io.Output
    comfy_api.latest.ui.PreviewVideo
    comfy_api.latest.ui.SavedResult
    folder_paths.get_output_directory
    server.PromptServer.send_progress_text text node_id
    server.PromptServer.send_sync event data sid
""")

MODEL_CLASS = _needs("""
    comfy.ldm.hunyuan_video.model.HunyuanVideo
    comfy.ldm.hunyuan_video.model.HunyuanVideo._forward = x timestep context y txt_byt5 clip_fea guidance \
attention_mask guiding_frame_index ref_latent disable_time_r control transformer_options
    comfy.ldm.flux.layers.DoubleStreamBlock.forward img txt vec pe attn_mask modulation_dims_img \
modulation_dims_txt transformer_options
    comfy.ldm.flux.layers.SingleStreamBlock.forward vec pe attn_mask modulation_dims transformer_options
    comfy.ldm.flux.layers.timestep_embedding t dim time_factor
    comfy.ldm.modules.attention.optimized_attention
    comfy.ldm.common_dit.pad_to_patch_size img patch_size padding_mode
    comfy.conds.CONDRegular
    comfy.conds.CONDConstant
    comfy.conds.CONDList
    comfy.model_base.BaseModel.__init__ model_config model_type device unet_model
    comfy.model_base.BaseModel.apply_model x t c_concat c_crossattn control transformer_options
    comfy.model_base.BaseModel.get_dtype_inference
    comfy.model_base.BaseModel.process_latent_in
    comfy.model_base.BaseModel.process_latent_out
    comfy.model_base.BaseModel.resize_cond_for_context_window = cond_key cond_value window x_in device \
retain_index_list
    comfy.model_base.HunyuanVideo.extra_conds
    comfy.model_base.HunyuanVideo.extra_conds_shapes
    comfy.model_base.ModelType.FLOW
    comfy.supported_models.HunyuanVideo.get_model = state_dict prefix device
    comfy.supported_models.models
""")

PROMPTS = _needs("""
    comfy.text_encoders.hunyuan_video.HunyuanVideoTokenizer.tokenize_with_weights text
""")

CHECKPOINTS = _needs("""
    comfy.sd.load_diffusion_model_state_dict sd model_options metadata
    comfy.model_detection.detect_unet_config state_dict key_prefix
    comfy.ops.disable_weight_init
    comfy.quant_ops.QUANT_ALGOS
    comfy.quant_ops.QuantizedTensor.from_float tensor layout_cls
    comfy.lora.load_lora lora to_load log_missing
    comfy.lora.model_lora_keys_unet model key_map
    comfy.lora_convert.convert_lora sd
    comfy.utils.get_attr obj attr
    comfy.utils.load_torch_file ckpt
    comfy.memory_management.aimdo_enabled
    comfy.model_management.get_torch_device
    comfy.model_patcher.ModelPatcher.add_patches patches strength_patch
    comfy.model_patcher.ModelPatcher.clone
    folder_paths.get_filename_list folder_name
    folder_paths.get_folder_paths folder_name
    folder_paths.get_full_path_or_raise folder_name filename
    comfy_api.latest.io.Boolean.Input
    comfy_api.latest.io.Combo.Input
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Model.Input
    comfy_api.latest.io.Model.Output
    comfy_api.latest.io.String.Output
    comfy_api.latest.ui.PreviewText
""")

WAN = _needs("""
    comfy.ldm.wan.model.WanModel
    comfy.ldm.wan.model.WanModel._forward x timestep context clip_fea time_dim_concat transformer_options
    comfy.ldm.wan.model.WanModel.forward_orig x t context clip_fea freqs transformer_options
    comfy.ldm.wan.model.WanT2VCrossAttention.forward = x context transformer_options
    comfy.ldm.wan.model.sinusoidal_embedding_1d dim position
    comfy.model_base.WAN21
    comfy.model_detection.count_blocks state_dict_keys prefix_string
    comfy.model_management.get_torch_device
    comfy.model_management.unet_offload_device
    comfy.model_patcher.CoreModelPatcher
    comfy.ops.manual_cast
    comfy.patcher_extension.WrappersMP.APPLY_MODEL
    comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
""")

CONTEXT = _needs("""
    comfy_api.latest.io.Clip.Input
    comfy_api.latest.io.Combo.Input
    comfy_api.latest.io.Image.Output
    comfy_api.latest.io.Int.Input
    comfy_api.latest.io.Int.Output
    comfy_api.latest.io.String.Input
    comfy_api.latest.io.String.Output
    comfy_api.latest.ui.PreviewImage
    comfy_api.latest.ui.PreviewText
""")

VAE_FAMILIES = _needs("""
    comfy.ldm.models.autoencoder.AutoencoderKL
    comfy.ldm.wan.vae.WanVAE
    comfy.ldm.wan.vae2_2.WanVAE
    comfy.taesd.taehv.TAEHV
""")

SECTIONS = _needs("""
    comfy_extras.nodes_custom_sampler.Noise_RandomNoise
    latent_preview.get_previewer device latent_format
    comfy.samplers.CFGGuider.sample noise latent_image sampler sigmas callback disable_pbar seed
    comfy.samplers.CFGGuider.set_conds
    comfy.clip_vision.Output
    comfy.ldm.modules.attention.attention_pytorch
    comfy.model_management.get_torch_device_name device
    comfy.model_management.get_free_memory dev
    comfy.model_management.intermediate_device
    comfy.model_management.InterruptProcessingException
    comfy.model_management.is_oom
    comfy.model_management.OOM_EXCEPTION
    comfy.model_management.should_use_bf16 device
    comfy.model_management.soft_empty_cache
    comfy.model_management.throw_exception_if_processing_interrupted
    comfy.model_management.unload_all_models
    comfy.model_patcher.ModelPatcher.add_weight_wrapper name function
    comfy.model_patcher.ModelPatcher.get_model_object name
    comfy.model_patcher.ModelPatcher.set_model_compute_dtype dtype
    comfy.model_patcher.create_model_options_clone
    comfy.patcher_extension.WrappersMP.APPLY_MODEL
    comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    comfy.patcher_extension.WrappersMP.PREDICT_NOISE
    comfy.patcher_extension.add_wrapper_with_key wrapper_type key wrapper transformer_options is_model_options
    comfy.patcher_extension.get_wrappers_with_key wrapper_type key transformer_options
    comfy_api.torch_helpers.torch_compile.COMPILE_KEY
    comfy.ops.fp8_ops.Linear
    comfy.sd.VAE sd device dtype
    comfy.utils.ProgressBar.update_absolute value total preview
    comfy.utils.repeat_to_batch_size tensor batch_size
    node_helpers.conditioning_set_values conditioning values
""")

SAMPLING = SECTIONS + _needs("""
    comfy.cli_args.args
    comfy.ldm.modules.attention.get_attention_function name default
    comfy.samplers.KSAMPLER sampler_function
    comfy_api.latest.InputImpl.VideoFromFile
    comfy_api.latest.io.Boolean.Input
    comfy_api.latest.io.Hidden.extra_pnginfo
    comfy_api.latest.io.Hidden.prompt
    comfy_api.latest.io.ClipVision.Input
    comfy_api.latest.io.Combo.Input
    comfy_api.latest.io.Conditioning.Input
    comfy_api.latest.io.Conditioning.Output
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Guider.Input
    comfy_api.latest.io.Image.Input
    comfy_api.latest.io.Image.Output
    comfy_api.latest.io.Int.Input
    comfy_api.latest.io.Latent.Input
    comfy_api.latest.io.Latent.Output
    comfy_api.latest.io.Mask.Input
    comfy_api.latest.io.Model.Input
    comfy_api.latest.io.Model.Output
    comfy_api.latest.io.Noise.Input
    comfy_api.latest.io.Sampler.Input
    comfy_api.latest.io.Sampler.Output
    comfy_api.latest.io.Sigmas.Input
    comfy_api.latest.io.Sigmas.Output
    comfy_api.latest.io.String.Input
    comfy_api.latest.io.String.Output
    comfy_api.latest.io.Vae.Input
    comfy_api.latest.io.Video.Output
    comfy_api.latest.ui.PreviewText
""")

ENCODER = _needs("""
    comfy.ldm.flux.layers.EmbedND dim theta axes_dim
    comfy.ldm.flux.math.apply_rope1 x freqs_cis
    comfy.ldm.modules.attention.attention_pytorch
    comfy.model_base.BaseModel.get_dtype_inference
    comfy.model_management.get_torch_device
    comfy.model_management.load_models_gpu models memory_required
    comfy.model_management.should_use_bf16 device
    comfy.model_management.unet_offload_device
    comfy.model_patcher.CoreModelPatcher model load_device offload_device
    comfy.model_patcher.ModelPatcher.clone
    comfy.model_patcher.ModelPatcher.get_additional_models_with_key key
    comfy.model_patcher.ModelPatcher.remove_additional_models key
    comfy.model_patcher.ModelPatcher.set_additional_models key models
    comfy.ops.cast_to_input weight input
    comfy.ops.manual_cast
""")

MEMORY = _needs("""
    comfy_api.latest.io.ClipVisionOutput.Input
    comfy_api.latest.io.Combo.Input
    comfy_api.latest.io.Conditioning.Input
    comfy_api.latest.io.Model.Input
    comfy_api.latest.io.Model.Output
    comfy_api.latest.io.String.Output
    comfy_api.latest.ui.PreviewText
    folder_paths.folder_names_and_paths
    folder_paths.get_filename_list folder_name
    folder_paths.get_full_path folder_name filename
    folder_paths.get_full_path_or_raise folder_name filename
""")

PRESERVATION = _needs("""
    comfy.samplers.CFGGuider.sample noise latent_image sampler sigmas disable_pbar seed
    comfy.samplers.CFGGuider.set_cfg cfg
    comfy.samplers.CFGGuider.set_conds positive negative
    comfy.samplers.sampler_object name
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Float.Output
    comfy_api.latest.io.Image.Output
    comfy_api.latest.io.Int.Input
    comfy_api.latest.io.Latent.Input
    comfy_api.latest.io.Vae.Input
    comfy_api.latest.ui.PreviewImage image cls
""")

MEMORY_FILES = _needs("""
    comfy.model_patcher.ModelPatcher.add_patches patches strength_patch
    comfy.utils.get_attr obj attr
    comfy_api.latest.io.Float.Input
    comfy_execution.graph_utils.ExecutionBlocker message
""")

WAN_NODES = _needs("""
    comfy.conds.CONDList
    comfy.ldm.common_dit.pad_to_patch_size img patch_size
    comfy.ldm.wan.model.WanModel
    comfy.ldm.wan.model.sinusoidal_embedding_1d dim position
    comfy.model_base.WAN21
    comfy.patcher_extension.WrappersMP.APPLY_MODEL
    comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    comfy.samplers.CFGGuider.sample noise latent_image sampler sigmas denoise_mask callback disable_pbar seed
    comfy.samplers.CFGGuider.set_conds
    comfy_api.latest.io.Conditioning.Input
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Guider.Output
""")

VIDEO = _needs("""
    comfy.ldm.wan.vae.CACHE_T
    comfy.ldm.wan.vae.count_cache_layers model
    comfy.model_management.cuda_device_context device
    comfy.model_management.get_free_memory dev
    comfy.model_management.is_oom
    comfy.model_management.load_models_gpu models memory_required force_full_load
    comfy.model_management.soft_empty_cache
    comfy.model_management.unload_all_models
    comfy.sd.VAE sd device dtype
    comfy.utils.tiled_scale_multidim samples function tile overlap upscale_amount out_channels index_formulas
    comfy.model_management.throw_exception_if_processing_interrupted
    comfy.utils.ProgressBar.update_absolute value total preview
    comfy_api.latest.InputImpl.VideoFromFile
    comfy_api.latest.io.Combo.Input
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Hidden.extra_pnginfo
    comfy_api.latest.io.Hidden.prompt
    comfy_api.latest.io.Latent.Input
    comfy_api.latest.io.String.Input
    comfy_api.latest.io.String.Output
    comfy_api.latest.io.Vae.Input
    comfy_api.latest.io.Video.Output
""")

SAVING = _needs("""
    folder_paths.get_save_image_path filename_prefix output_dir image_width image_height
""")

VIDEO_SOCKETS = _needs("""
    comfy_api.latest.Input.Video.get_active_trim_window
    comfy_api.latest.Input.Video.get_frame_rate
    comfy_api.latest.Input.Video.save_to path crf
    comfy_api.latest.InputImpl.VideoFromFile.get_stream_source
    comfy_api.latest.io.Int.Input
    comfy_api.latest.io.Video.Input
    folder_paths.get_temp_directory
""")

JOIN = _needs("""
    comfy.model_management.throw_exception_if_processing_interrupted
    comfy.utils.ProgressBar.update_absolute value total preview
    folder_paths.get_save_image_path filename_prefix output_dir image_width image_height
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Hidden.extra_pnginfo
    comfy_api.latest.io.Hidden.prompt
    comfy_api.latest.io.String.Input
    comfy_api.latest.io.String.Output
    comfy_api.latest.io.Video.Output
""")

JOURNAL = _needs("""
    comfy.clip_vision.Output
    comfy.model_management.throw_exception_if_processing_interrupted
    comfy_api.latest.io.Audio.Output
    comfy_api.latest.io.Boolean.Input
    comfy_api.latest.io.Conditioning.Input
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Image.Output
    comfy_api.latest.io.Int.Input
    comfy_api.latest.io.Int.Output
    comfy_api.latest.io.Latent.Output
    comfy_api.latest.io.String.Output
    comfy_api.latest.io.Vae.Input
    comfy_api.latest.ui.PreviewText
""")

SELFTEST = _needs("""
    comfy.clip_vision.Output
    comfy.utils.common_upscale samples width height upscale_method crop
    comfy_api.latest.io.Clip.Output
    comfy_api.latest.io.ClipVision.Output
""")

FIRST_FRAME = _needs("""
    comfy_api.latest.InputImpl.VideoFromComponents components
    comfy_api.latest.Types.VideoComponents
    comfy_api.latest.io.Autogrow.Input id template tooltip
    comfy_api.latest.io.Autogrow.TemplateNames input names min
    comfy_api.latest.io.Boolean.Input
    comfy_api.latest.io.Combo.Input
    comfy_api.latest.io.Image.Input
    comfy_api.latest.io.Image.Output
    comfy_api.latest.io.Int.Input
    comfy_api.latest.io.Int.Output
    comfy_api.latest.io.Latent
    comfy_api.latest.io.Mask.Input
    comfy_api.latest.io.MultiType.Input id types
    comfy_api.latest.io.String.Input
    comfy_api.latest.io.String.Output
    comfy_api.latest.io.Video.Output
    comfy_api.latest.ui.PreviewImage image cls
    comfy_api.latest.ui.PreviewText
    comfy_execution.graph_utils.ExecutionBlocker message
    folder_paths.get_temp_directory
""")

FIRST_FRAME_TRAINING = _needs("""
    comfy.ldm.wan.model.WanSelfAttention.forward
    comfy.model_management.in_training
    comfy.model_management.throw_exception_if_processing_interrupted
    comfy.model_patcher.ModelPatcher.add_object_patch name obj
    comfy.model_patcher.ModelPatcher.clone
    comfy.model_patcher.ModelPatcher.get_model_object name
    comfy.model_base.WAN21.concat_cond
    comfy.model_sampling.CONST
    comfy.model_sampling.ModelSamplingDiscreteFlow.percent_to_sigma = percent
    comfy.model_sampling.ModelSamplingDiscreteFlow.set_noise_scale noise_scale
    comfy.model_sampling.ModelSamplingDiscreteFlow.set_parameters = shift timesteps multiplier
    comfy.model_sampling.time_snr_shift = alpha t
    comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
    comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    comfy.utils.ProgressBar.update value
    comfy_extras.nodes_wan.WanImageToVideo.execute = positive negative vae width height length batch_size \
start_image clip_vision_output
    comfy_api.latest.io.Boolean.Input
    comfy_api.latest.io.Clip.Input
    comfy_api.latest.io.Combo.Input
    comfy_api.latest.io.Conditioning.Output display_name is_output_list tooltip
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Image.Output
    comfy_api.latest.io.Int.Input
    comfy_api.latest.io.Int.Output
    comfy_api.latest.io.Latent.Output display_name is_output_list tooltip
    comfy_api.latest.io.Model.Input
    comfy_api.latest.io.Model.Output
    comfy_api.latest.io.String.Input
    comfy_api.latest.io.String.Output
    comfy_api.latest.io.Vae.Input
    comfy_api.latest.ui.PreviewText
    folder_paths.get_input_directory
    folder_paths.get_input_subfolders
    node_helpers.conditioning_set_values conditioning values
""")

VIDEO_CLIPS = _needs("""
    comfy.clip_vision.Output
    comfy.model_management.throw_exception_if_processing_interrupted
    comfy.utils.ProgressBar.update value
    comfy.utils.ProgressBar.update_absolute value total preview
    comfy_api.latest.io.Clip.Input
    comfy_api.latest.io.ClipVision.Input
    comfy_api.latest.io.Combo.Input
    comfy_api.latest.io.Conditioning.Output display_name is_output_list tooltip
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Int.Input
    comfy_api.latest.io.Int.Output
    comfy_api.latest.io.Latent.Output display_name is_output_list tooltip
    comfy_api.latest.io.String.Output
    comfy_api.latest.io.Vae.Input
    comfy_api.latest.ui.PreviewText
    folder_paths.get_input_directory
    folder_paths.get_input_subfolders
    node_helpers.conditioning_set_values conditioning values
""")

DIAGNOSTICS = _needs("""
    comfy.model_management.throw_exception_if_processing_interrupted
    comfy.utils.ProgressBar.update_absolute value total preview
    comfy_api.latest.io.ClipVision.Input
    comfy_api.latest.io.Combo.Input
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Float.Output
    comfy_api.latest.io.Image.Input
    comfy_api.latest.io.Image.Output
    comfy_api.latest.io.Latent.Input
    comfy_api.latest.io.Mask.Input
    comfy_api.latest.io.String.Input
    comfy_api.latest.io.String.Output
    comfy_api.latest.io.Vae.Input
    comfy_api.latest.ui.PreviewImage image cls
""")

TRAINING = _needs("""
    comfy.ldm.wan.model.WanSelfAttention.forward
    comfy.lora.calculate_weight patches weight key
    comfy.model_management.is_oom
    comfy.model_management.OOM_EXCEPTION
    comfy.model_management.throw_exception_if_processing_interrupted
    comfy.model_patcher.ModelPatcher.add_patches patches strength_patch
    comfy.model_patcher.ModelPatcher.memory_required input_shape
    comfy.ops.CastWeightBiasOp
    comfy.ops.cast_bias_weight s input offloadable
    comfy.ops.disable_weight_init
    comfy.ops.uncast_bias_weight s weight bias offload_stream
    comfy.sd.load_lora_for_models model clip lora strength_model strength_clip
    comfy.utils.ProgressBar.update_absolute value total preview
    comfy.utils.get_attr obj attr
    comfy_api.latest.io.Boolean.Input
    comfy_api.latest.io.Combo.Input
    comfy_api.latest.io.Conditioning.Input
    comfy_api.latest.io.Float.Input
    comfy_api.latest.io.Image.Output
    comfy_api.latest.io.Int.Input
    comfy_api.latest.io.Latent.Input
    comfy_api.latest.io.Model.Input
    comfy_api.latest.io.Model.Output
    comfy_api.latest.io.Schema is_input_list is_output_node
    comfy_api.latest.io.String.Input
    comfy_api.latest.io.String.Output
    comfy_api.latest.ui.PreviewText
    comfy_execution.graph_utils.ExecutionBlocker
    folder_paths.get_folder_paths folder_name
    latent_preview.get_previewer device latent_format
""")

FAMILIES: dict[str, Family] = {
    "models": Family(("FrameMemoryLoadFramePack", "FrameMemoryLoraLoader"), API + MODEL_CLASS + CHECKPOINTS + PROMPTS),
    "wan": Family(
        ("FrameMemoryWanFrameContext", "FrameMemoryWanExpertGuider"), API + MODEL_CLASS + ENCODER + MEMORY + WAN_NODES
    ),
    "memory_models": Family(("FrameMemoryLoadMemoryModel",), API + MODEL_CLASS + CHECKPOINTS + WAN),
    "context": Family(("FrameMemoryContextPacker", "FrameMemoryPromptTimeline"), API + CONTEXT + PROMPTS),
    "sampling": Family(
        (
            "FrameMemoryFramePackImage",
            "FrameMemorySigmas",
            "FrameMemoryUniPC",
            "FrameMemoryStepCache",
            "FrameMemoryAntiDriftSampler",
            "FrameMemoryAttentionBackend",
        ),
        API + MODEL_CLASS + ENCODER + VAE_FAMILIES + PROMPTS + WAN + SAMPLING,
    ),
    "memory": Family(("FrameMemoryLoadEncoder", "FrameMemoryMemoryPack"), API + MODEL_CLASS + ENCODER + WAN + MEMORY),
    "preservation": Family(
        ("FrameMemoryFramePreservation", "FrameMemoryRetrieveFrame"),
        API + MODEL_CLASS + ENCODER + WAN + VAE_FAMILIES + PROMPTS + SECTIONS + MEMORY + PRESERVATION,
    ),
    "memory_files": Family(
        ("FrameMemoryLoadDirectForcing",), API + MODEL_CLASS + ENCODER + WAN + MEMORY + MEMORY_FILES
    ),
    "journal": Family(
        ("FrameMemoryPickSection", "FrameMemoryVideoHistory"), API + VAE_FAMILIES + VIDEO_SOCKETS + JOURNAL
    ),
    "video": Family(("FrameMemorySaveLongVideo",), API + VAE_FAMILIES + VIDEO + SAVING),
    "join": Family(("FrameMemoryJoinVideos",), API + VIDEO_SOCKETS + JOIN),
    "first_frame": Family(
        ("FrameMemoryFirstFrameComposer", "FrameMemoryFFGoPrompt", "FrameMemoryDropTransitionFrames"),
        API + FIRST_FRAME,
    ),
    "first_frame_training": Family(
        ("FrameMemoryFFGoDataset", "FrameMemoryExpertRange"), API + VAE_FAMILIES + FIRST_FRAME_TRAINING
    ),
    "video_clips": Family(("FrameMemoryVideoClips",), API + VAE_FAMILIES + VIDEO_CLIPS),
    "diagnostics": Family(
        ("FrameMemoryDriftMeter", "FrameMemoryRecall"), API + VAE_FAMILIES + VIDEO + VIDEO_SOCKETS + DIAGNOSTICS
    ),
    "training": Family(("FrameMemoryTrainDirectForcing",), API + MODEL_CLASS + ENCODER + WAN + TRAINING),
    "preservation_training": Family(
        ("FrameMemoryTrainPreservation",), API + MODEL_CLASS + ENCODER + WAN + MEMORY + TRAINING
    ),
    "wan_training": Family(("FrameMemoryTrainWanContext",), API + MODEL_CLASS + ENCODER + WAN + MEMORY + TRAINING),
    "selftest": Family(("FrameMemorySelfTestEncoders",), API + SELFTEST),
}
