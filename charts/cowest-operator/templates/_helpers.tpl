{{- define "cowest-operator.name" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "cowest-operator.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "cowest-operator.name" .) -}}
{{- else -}}
{{- required "serviceAccount.name: wanted the name of an existing service account, because serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "cowest-operator.selector" -}}
app.kubernetes.io/name: cowest-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "cowest-operator.labels" -}}
{{ include "cowest-operator.selector" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: cowest
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The address of an image: (dict "image" VALUES "root" $). */}}
{{- define "cowest-operator.image" -}}
{{- $registry := .root.Values.imageRegistry | default .image.registry -}}
{{- $name := printf "%s/%s" $registry .image.repository -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* The image of gateways on Ray: by its own values, its tag else that of the serving image with `-ray`. */}}
{{- define "cowest-operator.rayImage" -}}
{{- $images := .Values.jobImages -}}
{{- $tag := $images.servingRay.tag | default (printf "%s-ray" ($images.serving.tag | default .Chart.AppVersion)) -}}
{{- include "cowest-operator.image" (dict "image" (merge (dict "tag" $tag) $images.servingRay) "root" .) -}}
{{- end -}}

{{- define "cowest-operator.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "cowest-operator.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "cowest-operator.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}
