"""A source built as the release's `base_dataset.py` is; every sentence in it is ours."""

# The branches in the release's order, and what each shows.
SHOWN = {
    "faceframe": "audio frame face text",
    "face": "audio face text",
    "frame": "audio frame text",
    "audioonly": "audio",
    "textonly": "text",
    "faceonly": "face",
    "frameonly": "frame",
    "image": "image",
    "audio_text": "audio text",
    "face_text": "face text",
    "frame_text": "frame text",
    "multiface_text": "multi text",
    "multiface_audio_face_text": "multi audio face text",
    "multiframe_audio_frame_text": "multi audio frame text",
    "multiface_audio_face_frame_text": "multi audio face frame text",
}
HEADLESS = ("audio_text", "face_text", "frame_text")  # without the asker's role, in the release
INPUTS = {
    "multi": "Both at once: <Mix><MultiHere></Mix>. ",
    "audio": "What one hears: <Ear><AudioHere></Ear>. ",
    "face": "What the face does: <Eye><FaceHere></Eye>. ",
    "frame": "What the picture shows: <Eye><FrameHere></Eye>. ",
    "image": "A still: <Pic><ImageHere></Pic>. ",
    "text": "Words: <Sub>{subtitle}</Sub>. ",
}
TASK = "Take all of it and answer. {%s} ##Answerer: "


def branches():
    lines = []
    for number, (name, shown) in enumerate(SHOWN.items()):
        lines.append(f"        {'elif' if number else 'if'} face_or_frame == '{name}': # {shown}")
        if "text" in shown:
            lines.append("            assert subtitle is not None")
        texts = [INPUTS[slot] for slot in shown.split()] + [TASK % "user_message"]
        if name not in HEADLESS:
            texts[0] = "##Asker: " + texts[0]
        joined = " \\\n                    + ".join(f'f"{text}"' for text in texts)
        lines.append(f"            prompt =  {joined}")
    return "\n".join(lines)


def question_method(name, question, answer):
    return f"""
    def func_get_qa_{name}(self, sample, question_only=False):
        question = {question}

        if question_only:
            return question
        else:
            return {{
                'question': question, 
                'answer':   {answer}
                }}
"""


QUESTIONS = {
    "description": (r"""'How does the person feel,\tand "why"?'""", "sample['description'],"),
    "ovlabel": ("'Name every emotion: {a}, \\\\b.'", "f\"They feel {{{sample['ovlabel']}}}.\""),
    "onehot_w_candidates": (
        'f"Choose one of: {self.candidate_labels}."',
        "f\"I choose {sample['onehot']}.\"",
    ),
    "onehot_wo_candidates": ('"Name one emotion."', "f\"It is {sample['onehot']}.\""),
    "valence": (
        'f"How good is it? " \\\n'
        '                 + f"Here {self.minval} is worst, and {self.maxval} best: " \\\n'
        '                 + f"from {self.minval} to {self.maxval}."',
        "'It is 100%% at %.2f.' %(sample['valence']),",
    ),
    "sentiment": (
        '"Good, bad or ne\\U0001f600ither?"',
        "f\"It is {sample['sentiment']} to them.\"",
    ),
}
SOURCE = f"""import os
import torch
from my_affectgpt.models.tokenizer import load_tokenizer_from_LLM
import config

class BaseDataset():
    def __init__(self, vis_processor=None, model_cfg=None):

        self.vis_processor = vis_processor
        self.image_caption_prompt_candidates = ["What is this?",
                                                "Say what the picture shows."]

        self.audio_caption_prompt_candidates = ["What sounds here?", "Describe the noise."]
        if model_cfg is None: return
        self.max_length = model_cfg.max_length

    def func_random_prompts(self, candidates):
        index = random.randint(0, len(candidates) - 1)
        return candidates[index]
{"".join(question_method(name, *texts) for name, texts in QUESTIONS.items())}
    def func_get_qa_direct(self, sample):
        return {{
            'question': sample['question'],
            'answer':   sample['answer'],
            }}

    def func_get_qa_caption(self, sample, modality):
        if modality == 'image':
            return {{
            'question': self.func_random_prompts(self.image_caption_prompt_candidates),
            'answer':   sample['caption'],
            }}
        elif modality == 'audio':
            return {{
            'question': self.func_random_prompts(self.audio_caption_prompt_candidates),
            'answer':   sample['caption'],
            }}

    def func_get_qa_preference(self, sample):

        a1 = sample['preference']['a1']
        a2 = sample['preference']['a2']
        p  = sample['preference']['p']

        question = f"Two texts. a1: {{a1}} \\t\\t\\t a2: {{a2}} Which is better?"

        assert p in ['a1', 'a2', 'same']
        if p in ['a1', 'a2']:
            answer = f"Better: {{p}}."
        else:
            answer = f'They\\'re equal.'

        return {{
            'question': question,
            'answer':   answer,
            }}

    def func_get_description_reward(self, sample):
        reward = sample['reward']
        return {{'question': "Judge.", 'answer': f'{{reward}} it.'}}

    ## who shows what
    def get_prompt_for_multimodal(self, face_or_frame, subtitle, user_message):

        # several cases
{branches()}
        return prompt

    def __getitem__(self, index):
        qa_pair = self.get_qa_pairs(self.dataset, index)
        target = qa_pair['answer'] + '###'
        return target
"""
